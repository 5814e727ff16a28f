"""`undertow quantiles` and `undertow compare`: the quantiles of runs, as tables, CSV and charts."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .photographs import ground_option, json_option
from .printing import echo, fits, print_json, print_table
from .report import report_option
from .report import write as write_page


class _Of(click.Choice[str]):
    """What quantiles are of; a measure may also be written as `undertow record --measure` takes it, with dashes."""

    def convert(self, value: Any, *context: Any) -> str:
        """Read dashes as underscores."""
        return super().convert(str(value).replace("-", "_"), *context)


_SIDE_BY_SIDE = 16  # sites in columns; more have a line each
_FEW = 6  # quantiles that are all printed, however many sites there are

_of = click.option(
    "--of",
    type=_Of(("magnitude", "value", "channel_norm", "norm", "rms", "zero_fraction")),
    help="Default: the first of magnitude, channel_norm, norm, rms and zero_fraction that was recorded.",
)
_plot = click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="A .png, .svg or .pdf.")
_panels = click.option(
    "--panels",
    type=click.Choice(("quantile", "layer")),
    help="Of --plot: one for each quantile, with a bar a layer, or one for each layer, with a curve. "
    "Default: by quantile for up to six of them.",
)
_csv = click.option("--csv", "table", metavar="FILE", type=click.Path(path_type=Path), help="All of it, as CSV.")
_json = json_option(help="Print JSON instead of a table.")
_from = click.option("--from", "start", type=click.FloatRange(0, 1), default=0.05, show_default=True)
_to = click.option("--to", "stop", type=click.FloatRange(0, 1), default=0.95, show_default=True)
_step = click.option("--step", type=click.FloatRange(0.0001, 1), default=0.05, show_default=True)


@click.command(
    short_help="Each site's quantiles.",
    epilog="\b\nExamples:\n  undertow quantiles runs/vgg16\n"
    "  undertow quantiles runs/fashion --from .5 --to .9 --step .2 --of magnitude --plot q.png --csv q.csv",
)
@click.argument("run", type=click.Path(path_type=Path))
@_from
@_to
@_step
@_of
@_plot
@_panels
@ground_option
@_csv
@_json
def quantiles(
    run: Path,
    start: float,
    stop: float,
    step: float,
    of: str | None,
    plot: Path | None,
    panels: str | None,
    ground: str,
    table: Path | None,
    as_json: bool,
) -> int:
    """Print the quantiles of each site of RUN, 5 to 95 % unless asked otherwise; the median is marked.

    Of more than 16 sites, a line each with the lowest, the middle and the highest of them, or with all if they are no
    more than six; --csv has them all.
    """
    from ..runs import Run
    from ..runs import quantiles as quantiles_of

    _check_plot(plot, panels)
    rows = quantiles_of(Run(run), steps(start, stop, step), of=of)
    flat = [row.to_dict() for row in rows]
    _write_and_print(flat, table, as_json, _lines(rows))
    if plot:
        (name,) = _run_names([run])
        _draw({name: rows}, f"{name}: quantiles of {rows[0].of}", plot, panels, ground)
    return 0


@click.command(
    short_help="The quantiles of several runs, side by side.",
    epilog="\b\nExamples:\n  undertow compare runs/vgg16 runs/vgg16_bn\n"
    "  undertow compare runs/vgg16 runs/vgg16_bn --from .5 --to .9 --step .2\n"
    "  undertow compare runs/vgg16 runs/vgg16_bn --plot compare.png --csv compare.csv --report pair.html",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@_from
@_to
@_step
@_of
@_plot
@_panels
@ground_option
@_csv
@report_option
@_json
@click.pass_context
def compare(
    ctx: click.Context,
    runs: Sequence[Path],
    start: float,
    stop: float,
    step: float,
    of: str | None,
    plot: Path | None,
    panels: str | None,
    ground: str,
    table: Path | None,
    page: Path | None,
    as_json: bool,
) -> int:
    """Put the quantiles of RUNS side by side: values, ratios to the first run, and the spread p95/p5.

    Printed are the 5, 50 and 95 % quantiles, or with --from, --to or --step each of those asked for. Sites are paired
    by name where all runs have the same names, and by their order where not. Of photographs it is said in how many
    both networks saw the same class. Where the runs were recorded with diagnose=True, sentences say what the
    differences come from.
    """
    from ..diagnosis import coincidences, contrast
    from ..runs import Run, same_class
    from ..runs import compare as compare_runs

    _check_plot(plot, panels)
    opened = [Run(run) for run in runs]
    rows = compare_runs(opened, steps(start, stop, step), of=of)
    flat = [_flat(row, i, run) for row in rows for i, run in enumerate(runs) if row.quantiles[i] is not None]
    asked = any(ctx.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("start", "stop", "step"))
    names = _run_names(runs)
    _write_and_print(flat, table, as_json, _each_quantile(rows, names) if asked else _three_quantiles(rows, names))
    for other, run in zip(opened[1:], runs[1:], strict=True) if not as_json else ():
        if (agreement := same_class(opened[0], other)) is not None:
            echo(f"{runs[0]} and {run}: {agreement}")
    for sentence in (*coincidences(opened, rows), *contrast(opened)) if not as_json else ():
        echo(sentence)
    if plot:
        groups = {name: [row.quantiles[i] for row in rows if row.quantiles[i]] for i, name in enumerate(names)}
        _draw(groups, "Quantiles side by side", plot, panels, ground)
    if page:
        write_page(opened, page, quiet=as_json)
    return 0


def _check_plot(path: Path | None, panels: str | None) -> None:
    """Refuse, before anything is read, a figure that could not be written."""
    from ..errors import InputError
    from ..show.plots import check_ending

    if path:
        check_ending(path)
    elif panels:
        raise InputError(f"--panels {panels} is of a figure; name its file, as in --plot quantiles.png")


def _draw(groups: Any, title: str, path: Path, panels: str | None, ground: str) -> None:
    from ..show.plots import quantile_panels, save

    save(quantile_panels(groups, title, panels=panels), path, ground=ground)


def _flat(row: Any, i: int, run: Path) -> dict[str, Any]:
    """Return what is said of one run at one site, as one row of CSV or JSON."""
    site = row.quantiles[i]
    ratios = {f"ratio_p{100 * q:.10g}": ratio for q, ratio in zip(site.q, row.ratios[i], strict=True)}
    of_medians = {"ratio_of_medians": ratios["ratio_p50"]} if "ratio_p50" in ratios else {}
    return {"run": str(run), **site.to_dict(), "spread": row.spreads[i], **of_medians, **ratios}


def _run_names(runs: Sequence[Path]) -> list[str]:
    """Name each run by its folder's last part, by all of it where those are not different, or by its number too.

    >>> _run_names([Path("runs/a"), Path("runs/b")]), _run_names([Path("x/a"), Path("y/a")])
    (['a', 'b'], ['x/a', 'y/a'])
    >>> _run_names([Path("a"), Path("a")])
    ['a', 'a (2)']
    """
    short = [run.name or run.resolve().name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run) for run in runs]
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True)]


def _three_quantiles(rows: Sequence[Any], runs: Sequence[str]) -> list[Sequence[object]]:
    """Return a line for each site of each run: its 5, 50 and 95 % quantiles, and their ratios to the first run's."""
    names = ("p5", "median", "p95")
    lines: list[Sequence[object]] = [("site", "run", *names, *(f"{name} / first" for name in names), "p95 / p5")]
    for row in rows:
        for i, run in enumerate(runs):
            site, first = row.quantiles[i], row.quantiles[0]
            if site is None:
                continue
            some = (0, len(site.q) // 2, len(site.q) - 1)
            ratios = (_ratio(site.values[n], None if first is None else first.values[n]) for n in some)
            spread = _ratio(site.values[-1], site.values[0])
            lines.append((site.label, run, *(f"{site.values[n]:.4g}" for n in some), *ratios, spread))
    return lines


def _each_quantile(rows: Sequence[Any], runs: Sequence[str]) -> list[Sequence[object]]:
    """Return a line for each quantile of each site: the value in each run, and its ratio to the first run's."""
    lines: list[Sequence[object]] = [("site", "quantile", *runs, *(f"{run} / first" for run in runs[1:]))]
    for row in rows:
        known = next(site for site in row.quantiles if site is not None)
        for n, q in enumerate(known.q):
            values = [None if site is None else site.values[n] for site in row.quantiles]
            numbers = ("-" if value is None else f"{value:.4g}" for value in values)
            name = " | ".join(dict.fromkeys(site or "-" for site in row.sites))
            lines.append((name, f"{100 * q:g} %", *numbers, *(_ratio(value, values[0]) for value in values[1:])))
    return lines


def _ratio(value: float | None, first: float | None) -> str:
    """Return a ratio as text, and words where a zero is in it.

    >>> _ratio(3.0, 2.0), _ratio(0.0, 2.0), _ratio(3.0, 0.0), _ratio(0.0, 0.0), _ratio(3.0, None)
    ('1.5', '0', 'from 0', 'both 0', '-')
    """
    if value is None or first is None or math.isnan(value) or math.isnan(first):
        return "-"
    if first == 0:
        return "both 0" if value == 0 else "from 0"
    return f"{value / first:.4g}"


def steps(start: float, stop: float, step: float) -> list[float]:
    """Return start, start + step, ... up to stop, without the rounding of adding.

    >>> steps(0.05, 0.2, 0.05)
    [0.05, 0.1, 0.15, 0.2]
    """
    from ..errors import InputError

    if stop < start:
        raise InputError(f"--to {stop} lies below --from {start}; exchange them")
    return [round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1)]


def _lines(rows: Sequence[Any]) -> list[Sequence[object]]:
    """Return a table with sites side by side, or turned, with a line each, where it would be too wide."""
    q = rows[0].q
    if len(q) <= _FEW:
        return _by_quantile(rows) if fits(_by_quantile(rows)) else _by_site(rows, range(len(q)))
    if len(rows) <= _SIDE_BY_SIDE:
        return _by_site(rows, range(len(q))) if fits(_by_site(rows, range(len(q)))) else _by_quantile(rows)
    return _by_site(rows, sorted({0, min(range(len(q)), key=lambda i: abs(q[i] - 0.5)), len(q) - 1}))


def _by_quantile(rows: Sequence[Any]) -> list[Sequence[object]]:
    lines: list[Sequence[object]] = [("quantile", *(row.label for row in rows))]
    for i, q in enumerate(rows[0].q if rows else ()):
        mark = "  <- median" if q == 0.5 else ""
        lines.append((f"{100 * q:g} %{mark}", *(f"{row.values[i]:.4g}" for row in rows)))
    return [
        *lines,
        ("zeros", *(f"{row.zeros / row.count:.1%}" if row.count else "-" for row in rows)),
        ("values", *(f"{row.count:,}" for row in rows)),
        ("not finite", *(f"{row.nonfinite:,}" for row in rows)),
    ]


def _by_site(rows: Sequence[Any], some: Sequence[int]) -> list[Sequence[object]]:
    """Return a line for each site, with some of the quantiles asked for."""
    names = (f"{100 * rows[0].q[i]:g} %" for i in some)
    lines: list[Sequence[object]] = [("site", *names, "zeros", "values", "not finite")]
    for row in rows:
        zeros = f"{row.zeros / row.count:.1%}" if row.count else "-"
        lines.append(
            (row.label, *(f"{row.values[i]:.4g}" for i in some), zeros, f"{row.count:,}", f"{row.nonfinite:,}")
        )
    return lines


def _write_and_print(
    flat: list[dict[str, Any]], path: Path | None, as_json: bool, lines: Sequence[Sequence[object]]
) -> None:
    """Write CSV where asked for, and print JSON or a table."""
    from ..files import published

    if path:
        with published(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
            writer.writeheader()
            writer.writerows(flat)
    if as_json:
        print_json(flat)
        return
    bold = [i for i, line in enumerate(lines[1:]) if "median" in str(line[0])]
    print_table(lines[0], lines[1:], right=[name for name in lines[0][1:] if name != "run"], bold=bold)
