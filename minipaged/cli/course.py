"""The course on the command line: start, check, progress, hunt.

Exit codes of check, progress and hunt: 0 all holds; 1 something is wrong; 3 nothing is wrong and something is not
written yet; 2 a mistake in the command, as everywhere.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

FolderOption = Annotated[
    Path | None,
    typer.Option("--impl", metavar="DIR", help="your exercises (default: here, ./exercises, the repository's)"),
]


def start(folder: Annotated[Path, typer.Argument(help="where to put them")] = Path("exercises")) -> None:
    """Copy the exercises to a folder of your own. A file that is there already is left as it is.

    Example: minipaged start my_course
    """
    from minipaged.course.chapters import repository

    source = repository() / "tutorials" / "exercises"
    folder.mkdir(parents=True, exist_ok=True)
    new = kept = 0
    for path in sorted(source.glob("ch*.py")):
        target = folder / path.name
        if target.exists():
            kept += 1
            continue
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        new += 1
    print(f"{folder}: {new} exercises copied, {kept} were there and stay as they are")
    print(
        f"Begin with {folder}/ch01_masked_attention.py, or with any chapter you like: minipaged check 1 --impl {folder}"
    )


def check(
    chapter: Annotated[int, typer.Argument(help="1 to 10, or 13")],
    impl: FolderOption = None,
    only: Annotated[str, typer.Option(metavar="NAME", help="one file, class or function of it; the rest is ours")] = "",
    hint: Annotated[bool, typer.Option("--hint", help="show the next hint for the first thing that is wrong")] = False,
    properties: Annotated[bool, typer.Option("--properties", help="grade the properties you wrote yourself")] = False,
) -> None:
    """Run a chapter's properties over your exercise: what holds, what is missing, and the smallest counterexample.

    Example: minipaged check 6 --impl my_course --hint
    """
    from minipaged.course import chapters, state
    from minipaged.course.grade import grade
    from minipaged.course.hints import hints_for
    from minipaged.course.report import check_command, print_counterexample, print_grade, print_hint

    which, folder, console = chapters.chapter(chapter), exercise_folder(impl), Console()
    if properties:
        from minipaged.course.properties import grade_properties, print_verdicts

        with console.status(f"grading your properties of chapter {chapter}"):
            verdicts = grade_properties(which, folder)
        code = print_verdicts(which, verdicts, console)
        state.remember(folder, "properties", str(chapter), code)
        raise typer.Exit(code)
    with console.status(f"running the properties of chapter {chapter}"):
        result = grade(which, folder, only=only)
    print_grade(result, console)
    if not only:
        counts = {"holds": len(result.having("holds")), "of": len(result.findings)}
        state.remember(folder, "chapters", str(chapter), {"code": result.exit_code, **counts})
    if result.first_wrong:
        print_counterexample(result.first_wrong, console)
        hints = hints_for(chapter, result.first_wrong)
        level = state.next_level(folder, chapter, result.first_wrong["test"], hint, len(hints))
        print_hint(hints[level - 1], level, len(hints), check_command(chapter, folder, only), console)
    elif hint:
        console.print("Nothing is wrong, so there is nothing to hint at.")
    raise typer.Exit(result.exit_code)


def progress(impl: FolderOption = None) -> None:
    """The map of the chapters: what is written, and what the last check of each said.

    Example: minipaged progress --impl my_course
    """
    from minipaged.course.progress import print_progress

    raise typer.Exit(print_progress(exercise_folder(impl), Console()))


def hunt(
    number: Annotated[
        int | None, typer.Argument(help="which puzzle (default: the next of the chapters that you have done)")
    ] = None,
    impl: FolderOption = None,
    folder: Annotated[Path, typer.Option("--dir", help="where to put the broken module")] = Path("hunt"),
    answer: Annotated[str | None, typer.Option(metavar="FUNCTION:LINE", help="where the bug is")] = None,
) -> None:
    """Find a planted bug by its counterexample: which function is it in, and which line?

    Example: minipaged hunt 7 --answer FUNCTION:LINE
    """
    from minipaged.course.hunt import hunt as run

    raise typer.Exit(run(number, folder, answer, Console(), exercise_folder(impl)))


def exercise_folder(given: Path | None) -> Path:
    """The learner's folder: what they name, else the first of the usual places that holds an exercise."""
    from minipaged.course.chapters import repository

    if given is not None:
        return given
    for folder in (Path(), Path("exercises")):
        if any(folder.glob("ch[0-9][0-9]_*.py")):
            return folder
    return repository() / "tutorials" / "exercises"
