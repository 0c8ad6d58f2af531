"""The command line: one dict from command to its options and function. torch is imported only by what needs it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from advalign.cli.options import (
    CompareOptions,
    DemoOptions,
    DiagnoseOptions,
    EvaluateOptions,
    FrontierOptions,
    ListOptions,
    ModelOptions,
    ReportOptions,
    StudyOptions,
    TrainOptions,
    TransferOptions,
)
from advalign.cli.output import complain, lasting_output
from advalign.cli.parsing import parse_options
from advalign.errors import RankLost, TrainingError, UserError, quoted, shorten, unknown
from advalign.runtime.interrupts import stoppable
from advalign.runtime.launch import note_end
from advalign.training.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from advalign.evaluation.options import AttackOptions, TargetOptions


def train_command(options: TrainOptions) -> None:
    """Train, and print the next command."""
    from advalign.models import function_of
    from advalign.registration import register
    from advalign.runs.tensorboard import tensorboard_sink
    from advalign.runtime.interrupts import parse_duration
    from advalign.runtime.progress import say
    from advalign.training.train import train

    preset, chosen = RECIPES[options.recipe](), options.settings
    if chosen.norm != preset.norm and chosen.eps == preset.eps:
        raise UserError(
            f"--norm {chosen.norm} needs its radius, --eps: that of recipe {options.recipe} is for {preset.norm}"
        )
    for spelling in options.plugin:
        register(spelling)
    run = train(
        options.method,
        data=options.data,
        model=_with_width(options.model, options.width),
        recipe=options.settings,
        runs=options.runs,
        name=options.name,
        guests=_guests(options),
        allow_weak_guest=options.allow_weak_guest,
        init=options.init,
        trust_model=options.trust_model,
        extra=options.extra,
        data_dir=options.data_dir,
        image_size=options.image_size,
        device=options.device,
        time_budget=parse_duration(options.time_budget) if options.time_budget else None,
        checkpoint_seconds=options.checkpoint_seconds,
        cuda_graphs=options.cuda_graphs,
        sync_bn=options.sync_bn,
        sinks=(lambda run: [tensorboard_sink(run.path)]) if options.tensorboard else lambda run: [],
        console=_console(),
    )
    if run.finished:
        trust = " --trust-model" if function_of(run.setting["model"]) else ""
        done = "Trained" if not run.warning else "Trained to the end, but see the warning"
        say(_console(), f"{done}: {run.path}\nNext: advalign evaluate {str(run.path)!r}{trust}")
        if "vanilla" in run.setting["guests"]:
            say(_console(), f"More clean accuracy without training: advalign frontier {str(run.path)!r}{trust}")


def evaluate_command(options: EvaluateOptions) -> None:
    """Evaluate, print the table, and write JSON, Markdown, LaTeX and HTML."""
    from advalign.evaluation.measure import measure_radii
    from advalign.registration import register
    from advalign.report.balance import by_class_table
    from advalign.report.evaluation import evaluation_table, remarks, write_evaluation
    from advalign.report.radii import radii_table, radius_remarks, write_radii
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    if options.source is None and options.weights is None:
        for swallowed in filter(os.path.exists, options.attacks):
            raise UserError(f"--attacks takes all words that follow it: put {quoted(swallowed)} before --attacks")
    source, console, attacks = _source_of(options, "evaluate"), _console(), options.attacks
    if options.corruptions is not None:
        return _evaluate_corruptions(options, source, options.corruptions)
    if options.fast:
        if attacks != EvaluateOptions.attacks:
            raise UserError("--fast takes the place of --attacks: leave one out, or write --attacks fast with others")
        attacks = ("fast",)
    for spelling in options.plugin:
        register(spelling)
    measurements = measure_radii(
        source, options.eps or (None,), attacks, _target_options(options, options.n, None),
        _attack_options(options, options.precision),
        surrogate=options.surrogate, quantize=options.quantize, until=options.until, out=options.out,
        save_examples=options.save_examples, console=console,
    )  # fmt: skip
    for measured in measurements:
        print_table(console, evaluation_table(measured))
        if measured.by_class.imbalanced:
            print_table(console, by_class_table(measured.by_class))
        written = write_evaluation(measured, source) + ([".npz"] if options.save_examples else [])
        for line in remarks(measured):
            say(console, line)
        say(console, f"Written: {measured.path} (per image), {', '.join(written)}")
    if len(measurements) > 1:
        print_table(console, radii_table(measurements))
        for line in radius_remarks(measurements):
            say(console, line)
        say(console, f"Written: {write_radii(measurements, source)}, and its table and figure beside it")


def _evaluate_corruptions(options: EvaluateOptions, source: str, corruptions: str) -> None:
    """Evaluate under corruptions, print the table, and write JSON, Markdown, LaTeX and HTML."""
    from advalign.evaluation.corruptions import measure_corruptions
    from advalign.report.corruptions import corruption_line, corruption_table, write_corruptions
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    of_attacks = ("attacks", "fast", "norm", "eps", "until", "surrogate", "quantize", "plugin", "save_examples")
    for name in of_attacks:
        if getattr(options, name) != getattr(EvaluateOptions, name):
            flag = name.replace("_", "-")
            raise UserError(f"--corruptions measures without attacks: leave out --{flag}, or run another command")
    result = measure_corruptions(
        source, corruptions, _target_options(options, options.n, None), _attack_options(options), out=options.out,
        console=_console(),
    )  # fmt: skip
    print_table(_console(), corruption_table(result))
    say(_console(), corruption_line(result))
    say(_console(), f"Written: {result.path} (per image), {', '.join(write_corruptions(result, source))}")


def diagnose_command(options: DiagnoseOptions) -> None:
    """Diagnose, print the verdicts, and write JSON and HTML."""
    from advalign.evaluation.diagnose_source import diagnose_source
    from advalign.report.diagnosis import summary, verdict_table, write_diagnosis
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    source, console = _source_of(options, "diagnose"), _console()
    written = diagnose_source(
        source,
        _target_options(options, options.n, options.eps),
        _attack_options(options),
        out=options.out,
        console=console,
    )
    print_table(console, verdict_table(written.diagnosis))
    write_diagnosis(written, source)
    say(console, f"{summary(written.diagnosis)}\nWritten: {written.path}, .html")


def frontier_command(options: FrontierOptions) -> None:
    """Print the curve, and write it, its page, and the chosen network as a run."""
    from advalign.evaluation.options import AttackOptions, TargetOptions
    from advalign.frontier.frontier import frontier
    from advalign.frontier.result import FILE, read_frontier
    from advalign.models import function_of
    from advalign.registration import register
    from advalign.report.frontier import curve_table, write_page
    from advalign.report.frontier_words import alarms, summary
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    for spelling in options.plugin:
        register(spelling)
    target_options = TargetOptions(
        checkpoint=options.checkpoint, data=options.data, n=options.n, norm=options.norm, eps=options.eps,
        data_dir=options.data_dir, image_size=options.image_size, device=options.device,
        trust_model=options.trust_model,
    )  # fmt: skip
    traced = frontier(
        options.robust, *options.others, method=options.method, points=options.points, give=options.give,
        attacks=options.attacks, curve_attack=options.curve_attack, held_out=options.held_out,
        target_options=target_options,
        attack_options=AttackOptions(batch_size=options.batch_size, precision=options.precision, seed=options.seed),
        runs=options.runs, out=options.out, console=_console(),
    )  # fmt: skip
    stored = read_frontier(traced.path / FILE)
    print_table(_console(), curve_table(stored))
    for line in (*summary(stored), *alarms(stored)):
        say(_console(), line)
    page = write_page(stored)
    say(_console(), f"Written: {page}, {traced.path / 'frontier.json'}")
    assert traced.run is not None
    trust = " --trust-model" if function_of(traced.run.setting["model"]) else ""
    say(_console(), f"The chosen network: {traced.run.path}\nNext: advalign diagnose {str(traced.run.path)!r}{trust}")


def compare_command(options: CompareOptions) -> None:
    """Print the table of differences."""
    from advalign.evaluation.compare import compare
    from advalign.report.comparison import comparison_table
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    comparison = compare(options.first, options.second, options.checkpoint)
    print_table(_console(), comparison_table(comparison))
    for line in comparison.unreadable:
        say(_console(), line)


def transfer_command(options: TransferOptions) -> None:
    """Print the transfer matrix, and write it as JSON, Markdown and LaTeX."""
    from advalign.evaluation.options import TargetOptions
    from advalign.evaluation.transfer_matrix import transfer_matrix
    from advalign.registration import register
    from advalign.report.tables import print_table
    from advalign.report.transfer_matrix import matrix_table, write_matrix
    from advalign.runtime.files import require_writable
    from advalign.runtime.progress import say

    for spelling in options.plugin:
        register(spelling)
    require_writable(options.out)
    target_options = TargetOptions(
        data=options.data, n=options.n, norm=options.norm, eps=options.eps, data_dir=options.data_dir,
        device=options.device, trust_model=options.trust_model,
    )  # fmt: skip
    matrix = transfer_matrix(options.sources, options.attack, target_options, console=_console())
    print_table(_console(), matrix_table(matrix))
    say(_console(), f"Written: {write_matrix(matrix, options.out)} (per image), .md, .tex")


def study_command(options: StudyOptions) -> None:
    """Run the study, print its table, and say where the files are; exit code 1 if a cell failed."""
    from advalign.registration import register
    from advalign.report.tables import print_table
    from advalign.runtime.interrupts import parse_duration
    from advalign.runtime.progress import say
    from advalign.studies import SCALES, ExecutionContext, check_executor, find_study, plan_study, run_study

    if options.scale not in SCALES:
        raise unknown("scale", options.scale, SCALES)
    check_executor(options.executor, options.gpus)
    budget = parse_duration(options.time_budget) if options.time_budget else None
    for spelling in options.plugin:
        register(spelling)
    study, console = find_study(options.study, SCALES[options.scale], options.trust_model), _console()
    out = options.out or Path("studies") / f"{study.name}-{options.scale}"
    if options.dry_run:
        context = ExecutionContext(data_dir=options.data_dir)
        results = plan_study(study, seeds=options.seeds, runs=options.runs, out=out, context=context)
        for line in results.overview():
            say(console, line)
        return
    results = run_study(
        study, seeds=options.seeds, runs=options.runs, out=out, data_dir=options.data_dir, device=options.device,
        time_budget=budget, executor=options.executor, gpus=options.gpus, plugins=options.plugin, console=console,
    )  # fmt: skip
    if results.records():
        print_table(console, results.table())
    say(console, f"Written: {out} (report.html and its parts, table.md, records.jsonl)")
    if results.failures:
        raise TrainingError(
            f"{len(results.failures)} of {len(results.jobs)} cells failed; the same command tries again"
        )


def demo_command(options: DemoOptions) -> None:
    """Run the demo."""
    from advalign.runtime.interrupts import parse_duration
    from advalign.studies.demo import demo

    budget = parse_duration(options.time_budget) if options.time_budget else None
    demo(options.out, seed=options.seed, time_budget=budget, console=_console())


def report_command(options: ReportOptions) -> None:
    """Write the report and print its table."""
    from advalign.report import report_on
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    tables = report_on(
        options.paths, options.out, options.data_dir, maps=options.maps, trust_model=options.trust_model,
        console=_console(),
    )  # fmt: skip
    for table in tables:
        print_table(_console(), table)
    say(_console(), f"Written: {options.out}, and its tables and figures in {options.out.with_suffix('')}-files")


def list_command(options: ListOptions) -> None:
    """Print names, each with a line of description."""
    from advalign.cli.listing import LISTS, layers_of

    if options.what == "layers":
        if options.model is None:
            raise UserError("name the model, as in: advalign list layers resnet18")
        rows = layers_of(options.model)
    elif options.what in LISTS:
        rows = LISTS[options.what]()
    else:
        raise unknown("list", options.what, [*LISTS, "layers"])
    if options.model is not None and options.what != "layers":
        raise UserError(f"list {options.what} takes no further argument, not {quoted(options.model)}")
    width = max(len(name) for name, _ in rows)
    for name, description in rows:
        print(f"{name:<{width}}  {description}".rstrip())


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (TrainOptions, train_command),
    "evaluate": (EvaluateOptions, evaluate_command),
    "diagnose": (DiagnoseOptions, diagnose_command),
    "frontier": (FrontierOptions, frontier_command),
    "compare": (CompareOptions, compare_command),
    "transfer": (TransferOptions, transfer_command),
    "study": (StudyOptions, study_command),
    "demo": (DemoOptions, demo_command),
    "report": (ReportOptions, report_command),
    "list": (ListOptions, list_command),
}

# Commands that keep what is done, when they are stopped.
_RESUMED = ("train", "evaluate", "frontier", "transfer", "study", "demo")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 and one line for bad input, with 1 for training that failed, with 130 for a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    works = arguments[:1] not in ([], ["list"]) and not {"-h", "--help"} & set(arguments)
    notice, reasons = "advalign: nobody reads the output any more; the work goes on" if works else "", []
    try:
        with lasting_output(notice), stoppable() as reasons:
            _dispatch(arguments)
    except (Exception, KeyboardInterrupt) as error:
        code, line = _ending(error, reasons, resumes=arguments[0] in _RESUMED if arguments else False)
        note_end(code)
        if not line:
            raise
        if arguments[:1] != ["train"] or _speaks(error):
            complain(line)
        sys.exit(code)
    note_end(0)


def _speaks(error: BaseException) -> bool:
    """Tell whether this process says how its training has ended: of several on a machine, one is enough."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankLost):
        return True
    from advalign.runtime.ranks import launched

    try:
        return launched() == 1
    except UserError:  # there are no others that could say it
        return True


def _ending(error: BaseException, reasons: Sequence[str], *, resumes: bool) -> tuple[int, str]:
    """Return exit code and line for what has ended a command; no line for an error of the program's own."""
    if reasons or isinstance(error, KeyboardInterrupt):
        how = "resumes from what was saved last" if resumes else "starts again"
        return 130, f"advalign: stopped at once, {(*reasons, 'SIGINT arrived')[0]}; the same command {how}"
    if isinstance(error, UserError):
        return 2, f"advalign: error: {' '.join(str(error).splitlines())}"
    if isinstance(error, TrainingError):
        return 1, f"advalign: {error}"
    if isinstance(error, OSError):  # of a file that was not looked at before: a name too long, a disk that has gone
        named = f": {shorten(str(error.filename))}" if error.filename else ""
        return 2, f"advalign: error: {error.strerror or error}{named}"
    return 70, ""


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<9} {(options.__doc__ or '').strip()}" for name, (options, _) in COMMANDS.items()]
        print("usage: advalign COMMAND [options]\n\n" + "\n".join(lines) + "\n\nSee also: advalign COMMAND --help.")
        return
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"advalign {version('advalign')}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    if command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"advalign {command} is one process; only train is started by torchrun")
    options, run = COMMANDS[command]
    defaults = {}
    if options is TrainOptions:
        defaults["default"] = TrainOptions(method=tyro.MISSING, data=tyro.MISSING, settings=_preset(rest))
    words = _each_radius(rest) if command == "evaluate" else rest
    parsed = parse_options(options, f"advalign {command}", words, **defaults)
    if isinstance(parsed, TrainOptions) and parsed.devices is not None and _launches(parsed.devices, parsed.device):
        from advalign.runtime.launch import launch

        if code := launch(arguments, parsed.devices):
            sys.exit(code)
        return
    run(parsed)


def _each_radius(arguments: Sequence[str]) -> list[str]:
    """Write `--eps A B` as `--eps A --eps B`, so that the word behind the last number can be the run."""
    words, behind = [], False
    for word in arguments:
        number = re.fullmatch(r"-?[\d.]+(e-?\d+)?(/[\d.]+)?", word) is not None
        words += ["--eps", word] if behind and number and words[-1] != "--eps" else [word]
        behind = word == "--eps" or (behind and number)
    return words


def _launches(devices: int, device: str) -> bool:
    """Tell whether this process starts others that train; those have the same arguments and do not.

    Raises:
        UserError: a number of devices that this machine has not, or that torchrun has not started.
    """
    from advalign.runtime.ranks import device_for_each, launched

    if devices < 1:
        raise UserError(f"devices={devices} must be at least 1")
    if launched() > 1:
        here = os.environ["LOCAL_WORLD_SIZE"]
        if here != str(devices):
            raise UserError(f"--devices {devices} starts processes, and torchrun has started {here}: leave it out")
        return False
    if devices > 1:
        device_for_each(device, devices)
    return devices > 1


def _preset(arguments: list[str]) -> Recipe:
    """Read --recipe before the other flags, whose defaults are the values of that recipe."""
    name = "common"
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--recipe="):
            name = argument.partition("=")[2]
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def _guests(options: TrainOptions) -> dict[str, str]:
    """Return the sources of the networks beside the student, each of which must be named once."""
    flags = {"vanilla": options.vanilla, "robust": options.robust, "extractor": options.extractor}
    guests = {name: source for name, source in flags.items() if source}
    for assignment in options.guest:
        name, _, source = assignment.partition("=")
        if not (name and source):
            raise UserError(f"--guest {quoted(assignment)} must be NAME=SOURCE, as in --guest peer=runs/other")
        if name in guests:
            raise UserError(f"the {shorten(name)} model is given twice: {quoted(guests[name])} and {quoted(source)}")
        guests[name] = source
    return guests


def _source_of(options: ModelOptions, verb: str) -> str:
    """Return the run or weights file, which must be named once: as an argument, or by --weights."""
    if (options.source is None) == (options.weights is None):
        raise UserError(f"name what to {verb} once: a run folder or weights file, or --weights FILE")
    return str(options.weights if options.source is None else options.source)


def _target_options(options: ModelOptions, n: int | None, eps: float | None) -> TargetOptions:
    from advalign.evaluation.options import TargetOptions

    return TargetOptions(
        checkpoint=options.checkpoint, data=options.data, model=options.model, n=n, norm=options.norm, eps=eps,
        data_dir=options.data_dir, image_size=options.image_size, mean=options.mean, std=options.std,
        device=options.device, trust_model=options.trust_model,
    )  # fmt: skip


def _attack_options(options: ModelOptions, precision: str = "fp32") -> AttackOptions:
    from advalign.evaluation.options import AttackOptions

    return AttackOptions(batch_size=options.batch_size, precision=precision, seed=options.seed)


def _with_width(model: str, width: int | None) -> str:
    if width is None:
        return model
    if "(" in model:
        raise UserError(f"give the width once: --width {width} or in --model {quoted(model)}")
    return f"{model}(width={width})"


def _console() -> Any:
    from rich.console import Console

    several = os.environ.get("WORLD_SIZE", "1") != "1"  # a cluster may name a rank where there is one process
    return Console(quiet=several and os.environ.get("RANK", "0") != "0")  # of several processes, the first one speaks
