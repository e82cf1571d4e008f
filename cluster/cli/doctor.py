"""`tramontane doctor`: its output and exit codes.

0  no problems; there may be warnings
1  at least one problem or, with --strict, at least one warning
2  an option has an invalid value; nothing was examined
"""

import contextlib
import sys
from argparse import Namespace
from pathlib import Path

from cluster.doctor.examine import Options, examine
from cluster.doctor.findings import Severity, count
from cluster.doctor.report import render, summary, to_json
from cluster.terminal.phases import Console
from cluster.terminal.tables import answer_console
from workers.errors import ConfigError, TramontaneError

PLAIN_WIDTH = 140  # findings are easier to read in shorter lines


def doctor(args: Namespace) -> None:
    """Prints the findings. Raises ConfigError for an invalid option, TramontaneError if a problem was found."""
    if args.gpu:
        _check_gpu(args.gpu_report)
        return
    size = args.tensor_parallel_size
    if size is not None and size < 1:
        raise ConfigError(
            f"--tensor-parallel-size {size} is not a number of ranks.",
            remedy="Use at least 1.",
            param="--tensor-parallel-size",
        )
    if not 1 <= args.port <= 65_535:
        raise ConfigError(f"--port {args.port} is not a port number.", remedy="Use 1 to 65535.", param="--port")
    if not 0 < args.timeout < float("inf"):
        raise ConfigError(
            f"--timeout {args.timeout:g} is not a time in seconds.", remedy="Use a number above 0.", param="--timeout"
        )
    options = Options(
        model=args.model,
        revision=args.revision,
        gguf_file=args.gguf_file,
        ray_address=args.ray_address,
        tensor_parallel_size=size,
        device=args.device,
        host=args.host,
        port=args.port,
        deployment=args.name,
        run_all_reduce=not args.no_all_reduce,
        timeout_s=args.timeout,
    )
    # Ray prints errors of its workers to stdout, which belongs to the findings alone.
    with contextlib.redirect_stdout(sys.stderr):
        found = examine(options, Console())
    if args.json:
        print(to_json(found.findings, nodes=found.nodes, all_reduce=found.all_reduce))
    else:
        answer_console(plain_width=PLAIN_WIDTH).print(render(found.findings))
    bad = count(found.findings, Severity.PROBLEM)
    if bad or (args.strict and count(found.findings, Severity.WARNING)):
        raise TramontaneError(f"Not ready to serve: {summary(found.findings)}")


def _check_gpu(output: Path | None) -> None:
    from workers.gpu_check.main import check_gpu

    if check_gpu(lambda line: print(line, flush=True), output=output).is_wrong:
        raise TramontaneError("The GPU does not compute what the CPU does.", remedy="Report it with the lines above.")
