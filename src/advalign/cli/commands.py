"""The command line: one dict from command to its options and what it does. torch is imported only where it works."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from advalign.cli.options import (
    CompareOptions,
    DemoOptions,
    DiagnoseOptions,
    EvaluateOptions,
    ListOptions,
    ReportOptions,
    StudyOptions,
    TrainOptions,
    TransferOptions,
)
from advalign.errors import TrainingError, UserError, unknown
from advalign.spelling import parse_number, spell_number
from advalign.training.recipes import RECIPES, Recipe


def run_train(options: TrainOptions) -> None:
    """Train, and say how to go on."""
    from advalign.models import function_of
    from advalign.registration import register
    from advalign.runs.tensorboard import tensorboard_sink
    from advalign.runtime.interrupts import parse_duration
    from advalign.runtime.progress import say
    from advalign.training.train import train

    preset, chosen = RECIPES[options.recipe](), options.settings
    if chosen.norm != preset.norm and chosen.eps == preset.eps:
        raise UserError(
            f"--norm {chosen.norm} needs its radius, --eps: that of recipe {options.recipe} is of {preset.norm}"
        )
    for spelling in options.plugin:
        register(spelling)
    guests = {"vanilla": options.vanilla, "robust": options.robust, "extractor": options.extractor}
    run = train(
        options.method,
        data=options.data,
        model=_with_width(options.model, options.width),
        recipe=options.settings,
        runs=options.runs,
        name=options.name,
        guests={name: source for name, source in guests.items() if source},
        trust_model=options.trust_model,
        extra=options.extra,
        data_dir=options.data_dir,
        image_size=options.image_size,
        device=options.device,
        time_budget=parse_duration(options.time_budget) if options.time_budget else None,
        checkpoint_seconds=options.checkpoint_seconds,
        cuda_graphs=options.cuda_graphs,
        sinks=(lambda run: [tensorboard_sink(run.path)]) if options.tensorboard else lambda run: [],
        console=_console(),
    )
    if run.finished:
        trust = " --trust-model" if function_of(run.setting["model"]) else ""
        say(_console(), f"Trained: {run.path}\nNext: advalign evaluate {str(run.path)!r}{trust}")


def run_evaluate(options: EvaluateOptions) -> None:
    """Evaluate, print the table, and write JSON, Markdown and HTML."""
    from advalign.evaluation.measure import measure
    from advalign.report.card import robustbench_card
    from advalign.report.page import write_page
    from advalign.report.tables import accuracy_table, print_table
    from advalign.runtime.environment import environment
    from advalign.runtime.files import write_atomically, write_json
    from advalign.runtime.progress import say

    if options.source is None and options.weights is None:
        for swallowed in filter(os.path.exists, options.attacks):
            raise UserError(f"--attacks takes all that follow it: put {swallowed!r} before --attacks")
    source = _source(options, "evaluate")
    result = measure(
        source, options.attacks, checkpoint=options.checkpoint, data=options.data, model=options.model,
        n=options.n, norm=options.norm, eps=options.eps, batch_size=options.batch_size, precision=options.precision,
        seed=options.seed, device=options.device, data_dir=options.data_dir, image_size=options.image_size,
        mean=options.mean, std=options.std, surrogate=options.surrogate, trust_model=options.trust_model,
        out=options.out, save_examples=options.save_examples, console=_console(),
    )  # fmt: skip
    table = accuracy_table(result.records)
    print_table(_console(), table)
    write_atomically(result.path.with_suffix(".md"), table.markdown() + "\n")
    write_atomically(result.path.with_suffix(".tex"), table.latex() + "\n")
    known = "" if result.trained_here else "Weights from elsewhere: what they were trained on is not known."
    introduction = [*filter(None, [known]), *result.evaluation.warnings]
    write_page(result.path.with_suffix(".html"), f"Evaluation of {source}", introduction, table, [], environment())
    written = [".md", ".tex", ".html"]
    if any(record.attack == "autoattack" for record in result.records):
        card = robustbench_card(result.records, extra_data=result.extra_data)
        write_json(result.path.with_suffix(".robustbench.json"), card)
        written.append(".robustbench.json")
    if options.save_examples:
        written.append(".npz")
    for warning in result.evaluation.warnings:
        say(_console(), f"warning: {warning}")
    for name in filter(result.evaluation.unbounded.__contains__, result.evaluation.correct):
        far = result.distances.get(name)
        lie = "no image fools" if far is None else f"the images that fool lie at a mean L2 distance of {far:.3f}"
        say(_console(), f"{name}: {lie}; not confined to the threat model, so no part of the worst case")
    for name, (forward, backward) in result.evaluation.passes.items():
        n = len(result.evaluation)
        say(_console(), f"{name}: {forward / n:.1f} forward and {backward / n:.1f} backward passes an image")
    say(_console(), f"Written: {result.path} (per image), {', '.join(written)}")


def run_diagnose(options: DiagnoseOptions) -> None:
    """Diagnose, print the verdicts, and write JSON and HTML."""

    from advalign.evaluation.diagnose import diagnose
    from advalign.evaluation.measure import load_target
    from advalign.report.diagnosis import summary, verdict_table, write_diagnosis
    from advalign.report.tables import print_table
    from advalign.runs import find_weights
    from advalign.runtime.environment import environment
    from advalign.runtime.files import digest, require_writable, write_json
    from advalign.runtime.progress import say

    console = _console()
    source = _source(options, "diagnose")
    weights = find_weights(source, options.checkpoint, model=options.model, trust_model=options.trust_model)
    folder = options.out or weights.path.parent / "diagnosis"
    require_writable(folder)
    subject = load_target(
        weights, data=options.data, norm=options.norm, eps=options.eps, device=options.device,
        data_dir=options.data_dir, image_size=options.image_size, mean=options.mean, std=options.std, console=console,
    )  # fmt: skip
    with console.status("") as status:
        diagnosis = diagnose(
            subject.net, subject.images, subject.threat, n=options.n, batch_size=options.batch_size,
            seed=options.seed, advance=lambda what: status.update(f"diagnosing: {what}"),
        )  # fmt: skip
    print_table(console, verdict_table(diagnosis))
    setting = {
        "source": str(subject.path), "model": subject.model, "data": subject.dataset.name,
        "images": subject.dataset.digest, "seed": options.seed, "batch_size": options.batch_size,
    }  # fmt: skip
    made = repr([*setting.values(), diagnosis.n, diagnosis.threat])
    file = folder / f"{subject.path.stem}-{digest(made, digits=8)}.json"
    write_json(file, {**setting, **diagnosis.content(), "environment": environment()})
    introduction = [f"{subject.model} on {subject.dataset.name}.", *filter(None, [subject.dataset.note])]
    page = file.with_suffix(".html")
    write_diagnosis(page, f"Diagnosis of {source}", introduction, diagnosis, environment())
    say(console, f"{summary(diagnosis)}\nWritten: {file}, .html")


def run_compare(options: CompareOptions) -> None:
    """Print the table of differences."""
    from advalign.evaluation.compare import compare, comparison_table
    from advalign.report.tables import print_table

    comparison = compare(options.first, options.second, options.checkpoint)
    print_table(_console(), comparison_table(comparison))


def run_transfer(options: TransferOptions) -> None:
    """Print the transfer matrix, and write it as JSON, Markdown and LaTeX."""
    from advalign.evaluation.transfer_matrix import transfer_matrix
    from advalign.report.tables import print_table
    from advalign.runtime.progress import say

    matrix = transfer_matrix(
        options.sources, options.attack, data=options.data, n=options.n, norm=options.norm, eps=options.eps,
        data_dir=options.data_dir, device=options.device, trust_model=options.trust_model, out=options.out,
        console=_console(),
    )  # fmt: skip
    print_table(_console(), matrix.table)
    say(_console(), f"Written: {matrix.path} (per image), .md, .tex")


def run_study(options: StudyOptions) -> None:
    """Carry out the study, print its table, and say where the rest is; exit code 1 if a cell failed."""
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


def run_demo(options: DemoOptions) -> None:
    """Run the demo."""
    from advalign.runtime.interrupts import parse_duration
    from advalign.studies.demo import demo

    budget = parse_duration(options.time_budget) if options.time_budget else None
    demo(options.out, seed=options.seed, time_budget=budget, console=_console())


def run_report(options: ReportOptions) -> None:
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


def run_list(options: ListOptions) -> None:
    """Print names, each with a line on what it is."""
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
        raise UserError(f"list {options.what} takes nothing more, but {options.model!r} was given")
    width = max(len(name) for name, _ in rows)
    for name, description in rows:
        print(f"{name:<{width}}  {description}".rstrip())


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "train": (TrainOptions, run_train),
    "evaluate": (EvaluateOptions, run_evaluate),
    "diagnose": (DiagnoseOptions, run_diagnose),
    "compare": (CompareOptions, run_compare),
    "transfer": (TransferOptions, run_transfer),
    "study": (StudyOptions, run_study),
    "demo": (DemoOptions, run_demo),
    "report": (ReportOptions, run_report),
    "list": (ListOptions, run_list),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 and one line for bad input, with 1 for a run that broke down."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"advalign: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("advalign: stopped at once; the same command goes on from what was saved last", file=sys.stderr)
        sys.exit(130)
    except TrainingError as error:
        print(f"advalign: {error}", file=sys.stderr)
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<9} {(options.__doc__ or '').strip()}" for name, (options, _) in COMMANDS.items()]
        print("usage: advalign COMMAND [options]\n\n" + "\n".join(lines) + "\n\nadvalign COMMAND --help tells more.")
        return
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"advalign {version('advalign')}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    options, run = COMMANDS[command]
    defaults = {}
    if options is TrainOptions:
        defaults["default"] = TrainOptions(method=tyro.MISSING, data=tyro.MISSING, settings=_preset(rest))
    run(_parse(options, f"advalign {command}", rest, **defaults))


def _preset(arguments: list[str]) -> Recipe:
    """Find --recipe before the other flags are read: its values are their defaults."""
    name = "common"
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--recipe="):
            name = argument.partition("=")[2]
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def _parse(options: type, program: str, arguments: list[str], **defaults: Any) -> Any:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def fractions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
        if info.type is not float:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="NUMBER",
            instance_from_str=lambda given: parse_number(given[0]),
            is_instance=lambda value: isinstance(value, float | int),
            str_from_instance=lambda value: [spell_number(value)],
        )

    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return tyro.cli(options, prog=program, args=arguments, registry=registry, **defaults)
    except SystemExit as end:
        if end.code:
            raise UserError(_one_line(shown.getvalue()) + f"; see {program} --help") from None
        raise


# What tyro says of an option that has no default, in its own terms.
_OPTIONAL = re.compile(
    r"Error parsing (\S+): no type matching \{None\}\|(NUMBER|INT) could be instantiated from \['(.*)'\]"
)
_KINDS = {"NUMBER": "a number: write a decimal or a fraction, as in 8/255", "INT": "a whole number"}


def _one_line(box: str) -> str:
    """Return what a box of tyro's says before its first rule, and the option that it takes to be meant."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    texts = ["" if re.fullmatch(r"[^\w]*[─-]{8,}[^\w]*", line) else line for line in lines]
    texts = texts[1 if lines[0][:1] in "╭─" else 2 :]  # without the title, which plain terminals rule off as well
    message = " ".join(texts[: texts.index("")])
    message = _OPTIONAL.sub(lambda found: f"{found[1]}: {found[3]!r} is not {_KINDS[found[2]]}", message)
    near = next((text.split()[0] for text in texts if text.startswith("--")), "") if "Perhaps" in box else ""
    return message.rstrip(".") + (f"; did you mean {near}?" if near else "")


def _source(options: EvaluateOptions | DiagnoseOptions, verb: str) -> str:
    """Return what is named once: by its place, or by --weights."""
    if (options.source is None) == (options.weights is None):
        raise UserError(f"name what to {verb} once: a run folder or weights file, or --weights FILE")
    return str(options.source or options.weights)


def _with_width(model: str, width: int | None) -> str:
    if width is None:
        return model
    if "(" in model:
        raise UserError(f"give the width once: --width {width} or in --model {model!r}")
    return f"{model}(width={width})"


def _console() -> Any:
    from rich.console import Console

    return Console()
