"""The command line: ``python -m mla_fp8 demo | info | warmup | bench | certify | fuzz``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from mla_fp8 import __version__
from mla_fp8.cli import bench, certify, demo, fuzz, info, warmup
from mla_fp8.cli.command import CommandError


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a `CommandError`, in one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mla_fp8", description="The lightning indexer for NumPy and CuPy.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="find the passages of a text that answer a question",
        description="Index a real text as FP8 keys in a paged cache and ask it a question.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--query", default=demo.DEFAULT_QUERY, help="the question")
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="a text file (default: Python's own reference)"
    )
    command.add_argument("-k", type=int, default=demo.DEFAULT_K, help="keys per question token")
    command.add_argument(
        "--page-size", type=int, default=demo.DEFAULT_PAGE_SIZE, help="tokens per cache page"
    )
    command.add_argument("--top", type=int, default=demo.DEFAULT_TOP, help="passages to print")
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw where each question token looks"
    )
    command.set_defaults(run=demo.run)

    command = commands.add_parser("info", help="devices, versions and compiled kernels")
    command.set_defaults(run=info.run)

    command = commands.add_parser(
        "warmup",
        help="compile kernels ahead of time",
        description="Compile the kernels for usual batches and lengths into the kernel cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, what in (
        ("num-heads", 128, "query heads"),
        ("depth", 128, "channels per head"),
        ("k", 2048, "indices per token"),
        ("quantization-granularity", 128, "channels per key scale"),
        ("page-size", 64, "keys per page"),
    ):
        command.add_argument(f"--{name}", type=int, default=default, help=what)
    command.add_argument("--mask", default="causal", help="causal or null")
    command.add_argument("--arch", help="compile for this target, sm_90a say (default: the GPU's)")
    command.set_defaults(run=warmup.run)

    command = commands.add_parser(
        "bench",
        help="measure on this GPU (or NumPy on the CPU), and torch.topk and DeepGEMM if installed",
        description="Measure scoring and the whole operation, beside torch.topk and DeepGEMM if "
        "they are installed, and compare with an older run.",
    )
    bench.add_flags(command)
    command.set_defaults(run=bench.run)

    command = commands.add_parser(
        "certify",
        help="run the GPU tests and write tests/gpu_report.json",
        description="Run the whole GPU test suite, and compute-sanitizer on a subset, on the "
        "sources of this checkout, and write the results to tests/gpu_report.json.",
    )
    command.set_defaults(run=certify.run)

    command = commands.add_parser(
        "fuzz",
        help="run random calls and compare them with an oracle",
        description="Make random calls and compare every result with an oracle that knows only "
        "the contract. The first case that fails is made smaller and printed as Python code; the "
        "exit status is 1 then. Case i depends on the seed, the backend and i alone.",
    )
    command.add_argument(
        "--minutes", type=float, help=f"stop after so long (default: {fuzz.DEFAULT_MINUTES:g})"
    )
    command.add_argument("--cases", type=int, help="stop after so many cases")
    command.add_argument("--seed", type=int, default=0, help="(default: 0)")
    command.add_argument("--backend", default="numpy", help="numpy (default) or cuda")
    command.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    command.add_argument(
        "--json", type=Path, metavar="FILE", dest="json_file", help="write the counts"
    )
    command.set_defaults(run=fuzz.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Returns
    -------
    int
        0 on success, 1 if ``bench --compare`` finds something slower, 2 if the command cannot run
        (one line on stderr says why), 130 after Ctrl-C, 141 if stdout is a closed pipe.
    """
    argv = sys.argv[1:] if argv is None else argv
    command = " ".join(["mla_fp8", *(word for word in argv[:1] if word.isalpha())])
    try:
        try:
            arguments = vars(_parser().parse_args(argv))
            return int(arguments.pop("run")(**arguments) or 0)
        finally:
            if sys.stdout:  # None if stdout was closed when Python started
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout when it exits, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except (CommandError, ImportError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
