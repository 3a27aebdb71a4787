"""The command line: every verb is one stage, and starts from the file of the stage before it.

arguments -> recipe (file, then options) -> functions of qdq, engines and calib_data -> files, a table or JSON.
Modules that load a runtime are imported inside the verbs. `entry` starts it and says what each exit code means.
"""

from __future__ import annotations

import click

from qdq.cli.about.inspect import data, doctor, explain, measure_gpu, schema
from qdq.cli.about.words import completion, help_command
from qdq.cli.calibrate import calibrate
from qdq.cli.compare import compare
from qdq.cli.deploy import demo, deploy, report, segment
from qdq.cli.lint import lint_command as lint
from qdq.cli.stages import audit, build, check, export, plan, quantize
from qdq.cli.terminal import Verbs, voice_options
from qdq.cli.tune import tune


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qdq", message="%(prog)s %(version)s")
def main() -> None:
    """An ONNX model and real samples become a verified INT8 TensorRT engine, without a GPU.

    `qdq demo` shows it; `qdq deploy MODEL --data DATA --out DIR` does it all; the other verbs are its stages.

    `qdq help` explains schemes, limits, files and more.

    Exit codes: 0 done and passed, 1 a limit failed, 2 bad input, 3 a needed runtime is missing, 70 a fault of qdq,
    130 interrupted, 143 terminated.
    """


STAGES = (export, plan, tune, calibrate, quantize, build, audit, check)
VERBS = (
    *STAGES,
    deploy,
    report,
    segment,
    compare,
    explain,
    data,
    lint,
    doctor,
    measure_gpu,
    schema,
    demo,
    help_command,
    completion,
)
for verb in VERBS:
    verb.params += voice_options()
    main.add_command(verb)
