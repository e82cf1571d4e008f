"""SmolLM2 from its real GGUF file, where it is in the cache: what it says about itself, and what it answers."""

import re
import subprocess

import pytest
from support.paths import ROOT
from support.smollm2 import FILE, FOLDER, needs_smollm2

from cluster.cli.main import main
from cluster.config.checkpoint_check import examine_checkpoint
from cluster.text.chat.template import Message
from cluster.text.load import load_text
from workers.checkpoint.model_config import load_model_config
from workers.config import EngineConfig
from workers.engine.llm_engine import LLMEngine
from workers.protocol import GenerateRequest, SamplingParams

pytestmark = needs_smollm2
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def text():
    return load_text(FILE, chat_template="auto", model_vocab_size=load_model_config(FILE).vocab_size)


def test_the_checkpoint_is_complete():
    found = examine_checkpoint(FOLDER)
    assert found.faults == () and found.num_files == 1 and found.num_bytes == FILE.stat().st_size
    assert found.config is not None and found.config.stored is not None
    assert found.config.stored.label == "GGUF Q4_1 and Q8_0"


def test_it_answers_a_question(text):
    """The one in the README, with the answer that is printed there."""
    config = EngineConfig(
        model_path=str(FILE), model=load_model_config(FILE), max_model_len=256, kv_cache_bytes=1 << 26
    )
    prompt = text.chat_template.encode([Message(role="user", content=QUESTION)]).token_ids
    request = GenerateRequest(
        request_id="q", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=32, seed=0, temperature=0.0)
    )
    (answer,) = LLMEngine(config).generate([request])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    printed = re.search(rf'"content": "{re.escape(QUESTION)}".*?"content": "(.*?)"', readme, re.DOTALL)
    assert printed is not None and text.tokenizer.decode(answer[:-1]) == printed[1]
    assert answer[-1] in config.model.eos_token_ids


def test_plan_knows_its_bytes(capsys):
    """4.5 bits and a minimum of half a bit for each of 106 million weights, a table of plain numbers, and a head in 8.5 bits."""
    assert main(["plan", str(FOLDER), "--gpu", "cpu", "--memory", "4GiB", "--context", "2048"]) == 0
    said = capsys.readouterr().out
    assert "GGUF Q4_1 and Q8_0" in said and "0.21 GB" in said


def test_the_target_of_the_makefile_has_nothing_to_do():
    command = ["make", "--no-print-directory", "smollm2", f"SMOLLM2={FOLDER}", "PIP_ARGS=--no-index"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "is what it should be" in done.stdout and f'make serve ARGS="{FOLDER}"' in done.stdout
