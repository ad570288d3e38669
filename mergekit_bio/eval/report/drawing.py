"""How figures are drawn: one style, colours that colour-blind readers can tell apart, and what most figures share."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mergekit_bio.eval.report.build import Sweep, counted
from mergekit_bio.eval.report.tables import size
from mergekit_bio.eval.scoring.score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vP"
INK, GREY, GRID, PAPER = "#1c1c1c", "#6e6e6e", "#e3e3e3", "#ffffff"
ALPHA_AXIS: dict[str, Any] = {"xlabel": "merge strength alpha"}

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "text.color": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.titlesize": 8,
    "text.parse_math": False,  # a label may hold a dollar
    "pdf.fonttype": 42,  # text stays text: journals ask for it
    "svg.fonttype": "none",
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
#: Drawn with where they are installed, the first that has the letter, for what DejaVu Sans has none of.
FALLBACK_FONTS = (
    "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans JP", "Noto Sans SC",
    "Noto Sans KR", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Ethiopic", "Noto Sans Symbols2", "Source Han Sans",
    "IPAexGothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC",
    "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Leelawadee UI",
    "Arial Unicode MS", "Unifont",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure; ``kind`` and ``title`` make its file name.

    Attributes:
        kind: One word.
        caption: What it shows, in a few words.
        title: What it is about: run, dataset, query and the like.
        draw: Draws it, under ``STYLE``.
        sweep: The sweep that it is about; None where it compares several.
        files: The PNG and the PDF, once it is drawn.
        svg: The same, to stand in the page.
    """

    kind: str
    caption: str
    title: str
    draw: "Callable[[], Canvas]"
    sweep: Sweep | None = None
    files: tuple[Path, ...] = ()
    svg: str = ""


def font_families() -> list[str]:
    """The style's font and those of ``FALLBACK_FONTS`` that are here; matplotlib warns of others."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [*STYLE["font.sans-serif"], *(name for name in FALLBACK_FONTS if name in installed)]


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> Any:
    """A figure and its axes, without pyplot: no window system, nothing to close."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figsize)
    return canvas, canvas.subplots(rows, columns, **options)


def head(canvas: "Canvas", sweeps: Sequence[Sweep], about: str = "") -> None:
    """Say above a figure what it is about, so that it can stand by itself: dataset, query, number of clips, scorer."""
    first = sweeps[0]
    sizes = {sweep.cell.dataset: size(sweep) for sweep in sweeps}
    if len(sizes) > 1:
        clips = "; ".join(f"{dataset}: {text}" for dataset, text in sizes.items())
    else:
        clips = size(first) if len({size(sweep) for sweep in sweeps}) == 1 else counted(len(first.clips), "clip")
    lines = [about or first.title, f"{clips}, scorer {first.scores[0].scorer}"]
    if len(sweeps) == 1 and first.cell.query_text:
        lines.append(" ".join(first.cell.query_text.split()))
    wide = round(canvas.get_figwidth() * 16)  # letters
    text = "\n".join(textwrap.fill(textwrap.shorten(line, 2 * wide, placeholder=" …"), wide) for line in lines)
    canvas.suptitle(text, x=0.01, ha="left", linespacing=1.3)
    canvas.set_figheight(canvas.get_figheight() + 0.16 * (1 + text.count("\n")))


def legend_below(canvas: "Canvas", every: "Iterable[Axes]", columns: int = 0) -> None:
    """One legend for all axes, under them."""
    handles: dict[str, Any] = {}
    for axes in every:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns or len(handles))


def share_limit(sweeps: Iterable[Sweep]) -> float:
    """Where the y axis of shares ends: one for all figures of a report, so that they can be compared."""
    tops = [
        value
        for sweep in sweeps
        if sweep.cell.task != "captioning"
        for name in sweep.main_metrics
        for value in (
            *(item.intervals[name][1] for item in (*sweep.scores, *sweep.other_models)),
            *(sweep.baselines.get(f"{name}_{kind}", 0.0) for kind in ("majority", "random")),
        )
    ]
    # The tenth above, and a little for the markers.
    return min(1.0, math.ceil(max(tops, default=0.0) * 10 + 0.1) / 10) * 1.03 or 1.03


def curve(axes: "Axes", scores: Sequence[Score], metric: str, label: str, order: int = 0) -> None:
    """A metric against alpha, with its interval."""
    line(
        axes,
        [item.cell.alpha or 0.0 for item in scores],
        [item.metrics[metric] for item in scores],
        [item.intervals[metric] for item in scores],
        label,
        order,
    )


def line(
    axes: "Axes",
    places: Sequence[float],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    label: str,
    order: int = 0,
) -> None:
    """Values with their intervals; ``order`` decides colour and marker."""
    colour = COLOURS[order % len(COLOURS)]
    low, high = zip(*intervals, strict=True)
    axes.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
    marker = MARKERS[order % len(MARKERS)]
    axes.plot(places, values, color=colour, marker=marker, markerfacecolor=PAPER, markeredgewidth=1.3, label=label)


def baselines(axes: "Axes", sweep: Sweep, metric: str) -> None:
    """What majority and random answers get, where there are such baselines."""
    known = sweep.baselines
    for kind, dashes in (("majority", (5, 2)), ("random", (1, 1.5))):
        if f"{metric}_{kind}" in known:
            axes.axhline(known[f"{metric}_{kind}"], color=GREY, linewidth=1.1, dashes=dashes, label=kind)


def save(canvas: "Canvas", stem: Path) -> tuple[tuple[Path, Path], str]:
    """Write a figure as PNG and PDF, beside each other; returns them, and the figure as SVG to stand in the page."""
    import matplotlib

    files, svg = (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands there; the page has the letter
        # Laid out once: each of the three would do it twice.
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")
        for file in files:
            # Without a date the same report gives the same bytes.
            canvas.savefig(file, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
        # The page has many figures: no id may stand in two.
        with matplotlib.rc_context({"svg.hashsalt": stem.name}):
            canvas.savefig(svg, format="svg", metadata={"Date": None}, facecolor="none")
    return files, page_svg(svg.getvalue().decode())


#: Colour -> the variable of the page that stands for it, so that figures follow the page's colour scheme.
_VARIABLES = {
    INK: "ink", GREY: "soft", GRID: "grid", PAPER: "paper",
    BLUE: "blue", ORANGE: "orange", GREEN: "green", VERMILION: "vermilion", PURPLE: "purple", SKY: "sky",
}  # fmt: skip
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


#: What XML 1.0 cannot hold; labels and names of runs can.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def page_svg(svg: str) -> str:
    """matplotlib's SVG as it may stand in a page among others: no id twice, and in the colours of the page."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(_NO_XML.sub("\ufffd", svg))
    values = [value for part in root.iter() for value in part.attrib.values()]
    referred = {value.rpartition("#")[2].rstrip(")") for value in values if "#" in value}
    for parent in root.iter():
        for child in list(parent):
            # Its style is about the whole page, and is set below.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for part in root.iter():
        if part.get("id") not in referred:
            part.attrib.pop("id", None)
        if part.tag != f"{{{_SVG}}}text":
            part.text = None
        part.tail = None
        style = part.get("style")
        if style is not None:
            named = (setting.partition(":") for setting in style.split(";") if setting.strip())
            settings = {name.strip(): value.strip() for name, _, value in named}
            if font := settings.pop("font", None):  # older matplotlibs: "700 9px 'DejaVu Sans', ..."
                *weight, points = font.partition("px")[0].split()
                settings |= {"font-size": f"{points}px"} | ({"font-weight": weight[0]} if weight else {})
            settings.pop("font-family", None)
            for name, value in settings.items():
                if value in _VARIABLES:
                    settings[name] = f"var(--{_VARIABLES[value]}, {value})"
            part.set("style", "; ".join(f"{name}: {value}" for name, value in settings.items()))
    # Points as they are in print would be small on a screen.
    for side, points in zip(("width", "height"), root.get("viewBox", "").split()[2:], strict=True):
        root.set(side, f"{float(points) * 1.5:.0f}")
    root.set("class", "broad" if float(root.get("width", "0")) > 560 else "narrow")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt; font-family: 'DejaVu Sans', Verdana, sans-serif")
    return ElementTree.tostring(root, encoding="unicode")
