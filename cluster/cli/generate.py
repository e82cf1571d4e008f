"""`tramontane generate`: one prompt through the engine in this process, without Ray and without HTTP.

The only file of the control plane that runs the engine itself. It imports torch when it is called, not before.
"""

import secrets
import sys
from argparse import Namespace

import msgspec

from cluster.cli.launch.device import on_this_machine
from cluster.cli.launch.memory import check_memory
from cluster.cli.options.rows.profile import profile_file
from cluster.cli.options.settings import engine_config
from cluster.config.adapter_location import resolve_adapter
from cluster.config.checkpoint_check import check_checkpoint
from cluster.config.checkpoint_location import resolve_model
from cluster.profile.merge import Part
from cluster.terminal.phases import Console
from cluster.text.output.detokenizer import Detokenizer
from cluster.text.tokenizer import load_tokenizer
from workers.device.memory import read_memory
from workers.errors import ConfigError
from workers.profile.targets import Target
from workers.protocol import FinishReason, GenerateRequest, SamplingParams


def generate(args: Namespace) -> None:
    """Prints the completion as it is generated. Raises TramontaneError with the message for the user."""
    folder, _ = resolve_model(args.model, revision=args.revision, gguf_file=args.gguf_file)
    console, device = Console(), on_this_machine(args.device)
    if device.note is not None:
        console.line(device.note)
    config, dtype_reason = engine_config(args, folder, device=device.device)
    check_checkpoint(folder, chat_template=None)
    for line in (dtype_reason, check_memory(config, num_started=1, num_replicas=1, memory=read_memory())):
        if line is not None:
            console.line(line)
    adapters = [(name, resolve_adapter(source)) for name, source in args.lora or ()]
    profile = profile_file(args)
    tokenizer = load_tokenizer(folder, model_vocab_size=config.model.vocab_size)
    if args.max_tokens < 1:
        raise ConfigError(
            f"--max-tokens {args.max_tokens} leaves nothing to generate.",
            remedy="Use at least 1.",
            param="--max-tokens",
        )
    request = GenerateRequest(
        request_id="generate",
        prompt_token_ids=tokenizer.encode(args.prompt),
        sampling=SamplingParams(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=secrets.randbits(63) if args.seed is None else args.seed,
        ),
    )
    from workers.engine.llm_engine import LLMEngine, stream_requests
    from workers.profile.steps import profile_core

    with console.phase("Loading the weights") as phase:
        engine = LLMEngine(config, progress=phase.progress)
    for name, adapter in adapters:
        request = msgspec.structs.replace(request, adapter=engine.load_adapter(name, adapter))
    detokenizer = Detokenizer(tokenizer.pieces, continues=request.prompt_token_ids)
    recorded = None
    if profile is not None:
        text = Target(Detokenizer, "push", "detokenize")
        recorded = profile_core(engine.core, num_steps=profile.num_steps, also=[text])
    print(args.prompt, end="", flush=True)
    for delta in stream_requests(recorded or engine.core, [request]):
        token_ids = delta.token_ids[:-1] if delta.finish_reason is FinishReason.STOP else delta.token_ids
        print(detokenizer.push(token_ids), end="", flush=True)
    print(detokenizer.flush())
    sys.stdout.flush()
    if profile is not None and recorded is not None:
        console.line(profile.write([Part(process="generate", recording=recorded.finish())]))
