"""Where pictures are drawn: a PNG by matplotlib or an HTML file by plotly, with the same calls.

Both libraries are imported only here, and only once something is drawn. An HTML file holds all
that it needs.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from lowvram.errors import DeviceError, RecipeError

Floats = Sequence[float]
Texts = Sequence[str]

INK, FAINT = "#222222", "#767676"
_INCHES = (11.0, 6.2)
_DPI = 150


@dataclass(frozen=True, kw_only=True)
class Look:
    """Of a line."""

    label: str
    color: str
    dashed: bool = False
    stepped: bool = False
    dotted: bool = False
    """With a dot at each point."""


def open_canvas(path: Path, heights: Floats) -> Png | Html:
    suffix = path.suffix.lower()
    if suffix == ".png":
        return Png(heights)
    if suffix == ".html":
        return Html(heights)
    raise RecipeError(
        f"{path}: found {suffix or 'no suffix'}, allowed .png and .html. Give a name that ends so"
    )


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DeviceError(
            f"{name.partition('.')[0]} is not installed, and draws this picture. "
            "Install it: pip install 'lowvram[plot]'"
        ) from error


class Png:
    """By matplotlib, without its pyplot, which keeps figures and looks for a display."""

    def __init__(self, heights: Floats) -> None:
        self._figure = _library("matplotlib.figure").Figure(
            figsize=_INCHES, dpi=_DPI, layout="constrained"
        )
        _library("matplotlib.backends.backend_agg").FigureCanvasAgg(self._figure)
        grid = self._figure.subplots(
            len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
        )
        self._panels = [row[0] for row in grid]
        self._base: list[float] = []
        self._areas: list[Any] = []  # from the top down
        for panel in self._panels:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.tick_params(labelsize=9)

    def area(self, x: Floats, y: Floats, label: str, color: str, unit: str) -> None:
        base = self._base or [0.0] * len(y)
        self._base = [low + height for low, height in zip(base, y, strict=True)]
        # Its edge shows what is narrower than a pixel, but must not where there is nothing to see.
        least = max(self._base) / 1000
        there = [max(pair) > least for pair in zip([0.0, *y], y, strict=False)]
        look = {"facecolor": color, "edgecolor": color, "linewidth": 0.6, "label": label}
        area = self._panels[0].fill_between(x, base, self._base, there, step="post", **look)
        self._areas.insert(0, area)

    def line(self, panel: int, x: Floats, y: Floats, look: Look, hover: Texts = ()) -> None:
        self._panels[panel].plot(
            x,
            y,
            label=look.label,
            color=look.color,
            linewidth=1.4,
            linestyle=(0, (6, 4)) if look.dashed else "-",
            drawstyle="steps-post" if look.stepped else "default",
            marker="o" if look.dotted else "",
            markersize=7,
        )

    def labels(self, x: Floats, y: Floats, texts: Texts, color: str, *, above: bool) -> None:
        for at, text in zip(zip(x, y, strict=True), texts, strict=True):
            self._panels[0].annotate(
                text,
                at,
                xytext=(0, 8 if above else -8),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=9.5,
                fontweight="bold",
                color=color,
            )

    def bars(self, x: Floats, y: Floats, color: str, hover: Texts) -> None:
        bars = self._panels[1].bar(x, y, width=0.34, color=color)
        self._panels[1].bar_label(
            bars,
            [f"{height:.2f}" for height in y],
            label_type="center",
            color="white",
            fontsize=9,
            rotation=90 if len(x) > 6 else 0,
        )

    def note(self, x: float, y: float, text: str, *, to_right: bool, above: bool) -> None:
        self._panels[0].plot([x], [y], "o", ms=6, mfc="white", mec=INK, mew=1.4)
        self._panels[0].annotate(
            text,
            (x, y),
            xytext=(28 if to_right else -28, 10 if above else -20 if to_right else 0),
            textcoords="offset points",
            ha="left" if to_right else "right",
            va="bottom" if above else "top",
            fontsize=9,
            color=INK,
            parse_math=False,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "none", "alpha": 0.9},
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.9, "shrinkB": 3},
        )

    def ring(self, x: float, y: float, label: str) -> None:
        look = {"ms": 15, "mfc": "none", "mec": INK, "mew": 1.6, "ls": "none"}
        self._panels[0].plot([x], [y], "o", label=label, **look)

    def ribbon(self, left: float, right: float, text: str, color: str) -> None:
        below = self._panels[0].get_xaxis_transform()
        rectangle = _library("matplotlib.patches").Rectangle(
            (left, -0.056), right - left, 0.046, transform=below, clip_on=False
        )
        rectangle.set(facecolor=color, edgecolor="white", linewidth=0.8)
        self._panels[0].add_patch(rectangle)
        self._write((left + right) / 2, -0.034, text, fontsize=7.5)

    def below(self, x: float, text: str) -> None:
        self._write(x, -0.092, text, fontsize=9.5)

    def _write(self, x: float, y: float, text: str, fontsize: float) -> None:
        below = self._panels[0].get_xaxis_transform()
        self._panels[0].text(
            x, y, text, transform=below, ha="center", va="center", fontsize=fontsize, color=INK
        )

    def boundary(self, x: float) -> None:
        self._panels[0].axvline(x, color=FAINT, linewidth=0.9, linestyle=":")

    def hide_ticks(self, title: str) -> None:
        self._panels[0].set_xticks([])
        self._panels[0].set_xlim(0, 1)
        self._panels[0].set_xlabel(title, fontsize=9, labelpad=46, color=FAINT)

    def axis_x(self, limits: tuple[float, float], ticks: Sequence[str], title: str) -> None:
        last = self._panels[-1]
        last.set_xticks(range(len(ticks)), ticks)
        last.set(xlim=limits, xlabel=title)

    def axis_y(
        self, panel: int, title: str, limits: tuple[float, float], powers: Sequence[int] = ()
    ) -> None:
        axes = self._panels[panel]
        if powers:
            axes.set_yscale("log", base=2)
            axes.set_yticks(powers, [f"{power:,}" for power in powers])
        axes.set(ylim=limits, ylabel=title)

    def finish(self, title: str, subtitle: str, legend: str) -> None:
        top = self._panels[0]
        top.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK, pad=24)
        top.annotate(
            subtitle,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 8),
            textcoords="offset points",
            fontsize=10,
            color=FAINT,
        )
        for panel, heading in zip(self._panels, (legend, None), strict=False):
            lines = [line for line in panel.lines if not line.get_label().startswith("_")]
            handles = [*self._areas, *lines] if panel is top else lines
            if handles:
                panel.legend(
                    handles=handles,
                    loc="upper left",
                    bbox_to_anchor=(1.01, 1.0),
                    frameon=False,
                    fontsize=9,
                    title=heading,
                    title_fontsize=9,
                    alignment="left",
                )

    def content(self) -> bytes:
        buffer = BytesIO()
        self._figure.savefig(buffer, format="png")
        return buffer.getvalue()


class Html:
    """By plotly, with its JavaScript in the file."""

    def __init__(self, heights: Floats) -> None:
        self._figure = _library("plotly.subplots").make_subplots(
            rows=len(heights),
            cols=1,
            shared_xaxes=True,
            row_heights=list(heights),
            vertical_spacing=0.07,
        )
        self._places: Floats = ()
        self._total: list[float] = []  # of all areas

    def area(self, x: Floats, y: Floats, label: str, color: str, unit: str) -> None:
        name = label.partition(",")[0]
        self._total = [sum(pair) for pair in zip(self._total or [0.0] * len(y), y, strict=True)]
        self._places = x
        self._figure.add_scatter(
            x=x,
            y=y,
            name=label,
            mode="lines",
            stackgroup="areas",
            line={"width": 0, "shape": "hv", "color": color},
            legendrank=500 - len(self._figure.data),
            fillcolor=color,
            hovertemplate=f"%{{y:.3f}} {unit}<extra>{name}</extra>",
        )

    def line(self, panel: int, x: Floats, y: Floats, look: Look, hover: Texts = ()) -> None:
        self._figure.add_scatter(
            row=panel + 1,
            col=1,
            x=x,
            y=y,
            name=_lines(look.label),
            mode="lines+markers" if look.dotted else "lines",
            line={
                "color": look.color,
                "width": 1.8,
                "dash": "dash" if look.dashed else "solid",
                "shape": "hv" if look.stepped else "linear",
            },
            marker={"size": 9},
            **_hover(hover),
        )

    def labels(self, x: Floats, y: Floats, texts: Texts, color: str, *, above: bool) -> None:
        self._figure.add_scatter(
            row=1,
            col=1,
            x=x,
            y=y,
            # An empty line keeps them off the dots.
            text=[f"<b>{text}</b><br> " if above else f" <br><b>{text}</b>" for text in texts],
            mode="text",
            textposition="top center" if above else "bottom center",
            textfont={"color": color},
            showlegend=False,
            hoverinfo="skip",
        )

    def bars(self, x: Floats, y: Floats, color: str, hover: Texts) -> None:
        self._figure.add_bar(
            row=2,
            col=1,
            x=x,
            y=y,
            width=0.34,
            marker={"color": color},
            texttemplate="%{y:.2f}",
            textposition="inside",
            insidetextanchor="middle",
            textfont={"color": "white"},
            showlegend=False,
            **_hover(hover),
        )

    def note(self, x: float, y: float, text: str, *, to_right: bool, above: bool) -> None:
        marker = {"size": 9, "color": "white", "line": {"color": INK, "width": 2}}
        look = {"mode": "markers", "showlegend": False, "hoverinfo": "skip"}
        self._figure.add_scatter(x=[x], y=[y], marker=marker, **look)
        self._figure.add_annotation(
            x=x,
            y=y,
            text=_lines(text),
            align="left",
            ax=40 if to_right else -40,
            ay=-30 if above else 40,
            xanchor="left" if to_right else "right",
            arrowhead=0,
            standoff=4,
            bgcolor="rgba(255,255,255,0.9)",
        )

    def ring(self, x: float, y: float, label: str) -> None:
        marker = {"size": 20, "symbol": "circle-open", "color": INK, "line": {"width": 2}}
        look = {"mode": "markers", "name": _lines(label), "hoverinfo": "skip"}
        self._figure.add_scatter(x=[x], y=[y], row=1, col=1, marker=marker, **look)

    def ribbon(self, left: float, right: float, text: str, color: str) -> None:
        below = {"yref": "paper", "ysizemode": "pixel", "yanchor": 0, "y0": -6, "y1": -28}
        line = {"color": "white", "width": 1}
        self._figure.add_shape(type="rect", x0=left, x1=right, fillcolor=color, line=line, **below)
        self._write((left + right) / 2, -17, text, size=11)

    def below(self, x: float, text: str) -> None:
        self._write(x, -44, text, size=13)

    def _write(self, x: float, pixels: float, text: str, size: float) -> None:
        look = {"showarrow": False, "font": {"size": size}, "yanchor": "middle"}
        self._figure.add_annotation(x=x, y=0, yref="paper", yshift=pixels, text=text, **look)

    def boundary(self, x: float) -> None:
        self._figure.add_vline(x, line={"color": FAINT, "width": 1, "dash": "dot"})

    def hide_ticks(self, title: str) -> None:
        self._figure.update_xaxes(
            title={"text": title, "standoff": 62},
            range=[0, 1],
            showticklabels=False,
            showgrid=False,
            unifiedhovertitle={"text": "live then"},
        )
        self._figure.update_layout(hovermode="x unified")

    def axis_x(self, limits: tuple[float, float], ticks: Sequence[str], title: str) -> None:
        self._figure.update_xaxes(
            range=limits, tickvals=list(range(len(ticks))), ticktext=list(ticks), showgrid=False
        )
        self._figure.update_xaxes(zeroline=False)
        self._figure.update_xaxes(row=2, title=title)

    def axis_y(
        self, panel: int, title: str, limits: tuple[float, float], powers: Sequence[int] = ()
    ) -> None:
        if powers:
            limits = math.log10(limits[0]), math.log10(limits[1])
            self._figure.update_yaxes(
                row=panel + 1, type="log", tickvals=list(powers), tickformat=","
            )
        self._figure.update_yaxes(row=panel + 1, title=title, range=limits)

    def finish(self, title: str, subtitle: str, legend: str) -> None:
        if self._total:  # an outline shows what is narrower than a pixel
            line = {"color": FAINT, "width": 0.7, "shape": "hv"}
            look = {"mode": "lines", "showlegend": False, "hoverinfo": "skip"}
            self._figure.add_scatter(x=self._places, y=self._total, line=line, **look)
        self._figure.update_layout(
            template="plotly_white",
            title={
                "text": f"<b>{_lines(title)}</b>",
                "subtitle": {"text": _lines(subtitle)},
                "x": 0.02,
            },
            legend={"title": {"text": legend}, "traceorder": "normal"},
            margin={"b": 100},
        )

    def content(self) -> bytes:
        settings = {
            "displaylogo": False,
            "modeBarButtonsToRemove": ["select2d", "lasso2d"],
            "responsive": True,
            "showSendToCloud": False,  # a button that uploads the picture
        }
        page: str = self._figure.to_html(
            include_plotlyjs=True, default_height="94vh", config=settings
        )
        return page.encode()


def _hover(texts: Texts) -> dict[str, Any]:
    """Lines of text in a box, or no box."""
    if not texts:
        return {"hoverinfo": "skip"}
    return {
        "hovertext": [_lines(text) for text in texts],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _lines(text: str) -> str:
    """Text as plotly shows it unchanged: it reads some of HTML in it."""
    return html.escape(text, quote=False).replace("\n", "<br>")
