"""What `analysis` shows of tracked scales, read back from tables, pictures, pages."""

import html.parser
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rich.console import Console

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

X = jax.random.normal(jax.random.key(0), (64, 32))
W = jax.random.normal(jax.random.key(1), (32, 32))


def loss(w, x, scope="up"):
    with jax.named_scope(scope):
        y = x @ w
    return jnp.sum(jnp.maximum(y, 0))


def tracked(w, scope="up"):
    return jax.jit(jus.track_value_and_grad(lambda w: loss(w, X, scope)))(w)[-1]


@pytest.fixture(scope="module")
def scales():
    return tracked(W * 1e-4)


def printed(table, width=200):
    console = Console(width=width, record=True, force_terminal=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_table_shows_scales_ranges_and_what_formats_lose(scales):
    text = printed(analysis.summary(scales, title="a title"))
    y = np.asarray(X @ W) * 1e-4
    stats = scales["up/dot_general"].forward
    assert "a title" in text and "up/dot_general" in text and "64×32" in text
    assert f"2^{np.log2(np.sqrt(np.mean(y**2))):.1f}" in text
    lost = float(stats.underflow[2] / stats.size)  # E4M3's smallest number is 2^-9
    assert 0.5 < lost and f"↓{lost:.1%}" in text
    assert "\x1b[1;31m" in text  # red: 1e-4 is below 2^-8
    unit = tracked(W / 32**0.5).where(analysis.computed)  # without the loss
    assert "\x1b[1;31m" not in printed(analysis.summary(unit))
    narrow = printed(analysis.summary(scales), width=80)
    first = [line.split("│")[1] for line in narrow.splitlines() if "│" in line]
    assert "up/dot_general" in "".join(map(str.strip, first))  # folded, not cut


def test_what_is_not_finite_is_red_and_not_in_the_scale(tmp_path):
    x = X.at[0, :16].set(jnp.nan).at[1, :4].set(jnp.inf)
    scales = jus.track_scales(lambda x, y: None)(x, jnp.full((4,), jnp.nan))[1]
    first, second = (row.forward for row in analysis.rows(scales))
    cells = analysis._stats_cells(first, ["FP16"])
    assert cells["range"].danger == cells["log2 scale"].danger == 2
    for told in ("0.0078 NaN", "0.002 inf"):  # of 2048
        assert told in cells["range"].text
        assert told in printed(analysis.summary(scales))
    scale = np.sqrt(np.mean(np.asarray(x)[np.isfinite(x)] ** 2))
    assert cells["log2 scale"].text == f"2^{np.log2(scale):.1f}"
    assert analysis._stats_cells(second, [])["log2 scale"].text == "none"
    assert "\x1b[1;31m" in printed(analysis.summary(scales))
    analysis.report(scales, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="danger2"') >= 6 and "1 NaN" in page
    red = [t for t in analysis.exponents(scales).axes[0].texts if "NaN" in t.get_text()]
    assert len(red) == 2 and all(t.get_color() == "red" for t in red)
    assert "0.0078 NaN" in printed(analysis.compare(scales, scales).table)


def test_iterations_of_a_scan_are_rows_in_the_order_of_computation():
    def deep(x, ws):
        def layer(x, w):
            with jax.named_scope("layer"):
                return jnp.sin(x @ w), None

        return lax.scan(layer, x, ws)[0].sum()

    ws = jnp.stack([W, 2 * W, 4 * W])
    scales = jus.track_value_and_grad(deep)(X, ws)[-1]
    rows = [r for r in analysis.rows(scales) if r.name.startswith("layer/")]
    names = [r.name for r in rows]
    want = [f"layer/{op}[{i}]" for i in range(3) for op in ("dot_general", "sin")]
    assert names == want
    y = np.asarray(jnp.sin(X @ W) @ (2 * W))
    np.testing.assert_allclose(rows[2].forward.scale, np.sqrt(np.mean(y**2)), rtol=1e-4)


def test_a_backward_pass_that_is_written_down_is_backward():
    grad = jax.grad(lambda w: loss(w, X))
    rows = analysis.rows(jus.track_scales(grad)(W)[1])
    assert any(r.backward is not None and r.forward is None for r in rows)
    assert any(r.forward is not None and r.backward is None for r in rows)


def ticks(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def test_pictures_show_every_tensor_where_it_is(scales):
    rows = analysis.rows(scales)
    (axis,) = analysis.depth(scales).axes
    assert ticks(axis) == [r.name for r in rows]
    forward, backward = axis.get_lines()[3:5]  # behind the formats' three
    for line, side in ((forward, "forward"), (backward, "backward")):
        found = dict(zip(line.get_ydata(), line.get_xdata(), strict=True))
        for i, x in found.items():
            np.testing.assert_allclose(2.0**x, getattr(rows[i], side).scale, rtol=1e-6)
    figure = analysis.exponents(scales)
    for axis, side in zip(figure.axes, ("forward", "backward"), strict=True):
        share = axis.images[0].get_array()
        assert share.shape[0] == len(rows)
        stats = [getattr(r, side) for r in rows]
        for shown, s in zip(share, stats, strict=True):
            want = s.histogram / s.size
            np.testing.assert_array_equal(
                shown.filled(0), np.where(want < 1e-3, 0, want)
            )
    assert any("zero" in t.get_text() for t in figure.axes[0].texts)  # of the relu


def test_statistics_pool_to_the_histogram_of_their_elements(scales):
    y = X @ W * 1e-4
    x = X.at[0].set(0)
    (zeros,) = jus.track_scales(lambda x: None)(x)[1].values()
    product = scales["up/dot_general"].forward
    got = analysis.pooled([zeros.forward, None, product])
    want = analysis.histogram([x, y])
    np.testing.assert_array_equal(got.exponent, want.exponent)
    # Of a number near a power of two the compiled product may be on its other side.
    np.testing.assert_allclose(got.share, want.share, atol=2 / (X.size * 2))
    assert got.zero == want.zero == 32 / (2 * X.size)
    with pytest.raises(ValueError, match="`tracked` must be of at least one element"):
        analysis.pooled([None])


def test_a_comparison_joins_by_name_or_by_order(scales):
    large = tracked(W * 1e-4 * 2**6)
    table, picture = analysis.compare(scales, large, names=("small", "large"))
    text = printed(table)
    assert "forward small" in text and "2^+6.0" in text
    labels = [t.get_text() for t in picture.axes[0].get_legend().get_texts()]
    assert "small: forward" in labels and "large: backward" in labels
    ours = scales.where(lambda s: "dot_general" in s.name)
    theirs = tracked(W * 1e-4 * 2**6, "other").where(lambda s: "dot_general" in s.name)
    assert not set(ours) & set(theirs)
    assert "2^+6.0" in printed(analysis.compare(ours, theirs).table)
    with pytest.raises(ValueError, match="none and 1 and"):
        analysis.compare(ours, tracked(W, "other").where(lambda s: "up" not in s.name))


def test_scales_over_time(scales):
    stacked = analysis.stack([tracked(W * 2.0**k) for k in (-4, 0, 4)])
    forward, backward = analysis.timeline(stacked, (0, 10, 20)).axes[:2]
    i = ticks(forward).index("up/dot_general")
    shown = forward.images[0].get_array()[i]
    np.testing.assert_allclose(np.diff(shown), 4, atol=1e-5)
    with pytest.raises(ValueError, match=r"over 2 `steps`.*got first axes of \[3\]"):
        analysis.timeline(stacked, (0, 1))
    with pytest.raises(ValueError, match="got first axes of"):
        analysis.timeline(scales, (0,))


def test_a_report_stands_alone_and_escapes_names(tmp_path):
    class Page(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.links, self.cells, self.tags = [], [], []

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            self.links += [v for k, v in attrs if k in ("src", "href")]

        def handle_data(self, data):
            if self.tags[-1:] == ["td"]:
                self.cells.append(data)

    scales = tracked(W * 1e-4, "<b>&up")
    analysis.report(scales, tmp_path / "one.html", title="<i>")
    stacked = analysis.stack([scales, tracked(W, "<b>&up")])
    analysis.report(stacked, tmp_path / "two.html", steps=(0, 100))
    for name, pictures in (("one", 2), ("two", 3)):
        page = Page()
        page.feed((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
        assert len(page.links) == pictures
        assert all(link.startswith("data:image/png;base64,") for link in page.links)
        assert "<b>&up/dot_general" in page.cells
        assert not {"b", "i", "link", "iframe"} & set(page.tags)


def test_a_record_is_read_as_it_was_written(scales, tmp_path):
    for i, given in enumerate((scales, jus.track_scales(jnp.sin, formats={})(X)[1])):
        analysis.save(given, tmp_path / f"{i}.npz")
        found = analysis.load(tmp_path / f"{i}.npz")
        assert jax.tree.structure(found) == jax.tree.structure(given)
        jax.tree.map(np.testing.assert_array_equal, found, given)


def test_what_is_no_record_is_refused(scales, tmp_path):
    pair = (1.0, scales)
    for name, show in {
        "scales": lambda s: analysis.summary(s),
        "a": lambda s: analysis.compare(s, scales),
        "b": lambda s: analysis.compare(scales, s),
    }.items():
        with pytest.raises(TypeError, match=f"`{name}` must be the `Scales`.* tuple"):
            show(pair)
    for show in (analysis.rows, analysis.exponents, analysis.depth):
        with pytest.raises(TypeError, match="`scales` must be the `Scales`.* dict"):
            show({})
    with pytest.raises(TypeError, match="`scales` must be the `Scales`.* tuple"):
        analysis.timeline(pair, [0])
    for write in (analysis.report, analysis.save):
        with pytest.raises(TypeError, match="`scales` must be the `Scales`.* list"):
            write([scales], tmp_path / "file")
    for names in ("ab", ["a"]):
        with pytest.raises(ValueError, match="`names` must be two"):
            analysis.compare(scales, scales, names=names)


def test_what_are_no_histograms_is_refused():
    h = analysis.histogram([X])
    for rows in (h, [h], {"a": h}, {"a": {"x": X}}):
        with pytest.raises(TypeError, match="`rows` must be a mapping of names to map"):
            analysis.histograms(rows)
    for rows in ({}, {"a": {}}, {"a": {"x": h}, "b": {"y": h}}):
        with pytest.raises(ValueError, match="`rows` must have the same columns"):
            analysis.histograms(rows)
    with pytest.raises(TypeError, match="`formats` must be a mapping"):
        analysis.histograms({"a": {"x": h}}, formats=jus.E4M3)


def test_only_what_is_computed_is_kept():
    def f(x):
        return jnp.sin(x.reshape(-1).astype(jnp.bfloat16)[:5]).sum() * jnp.cos(x)

    everything = jus.track_scales(f)(X)[1]
    kept = jus.track_scales(f, where=analysis.computed)(X)[1]
    called = {t.site.name.split("/")[-1] for t in kept.values()}
    assert {"sin", "cos", "mul"} <= called
    assert not called & {"reshape", "slice", "convert_element_type", "reduce_sum"}
    assert list(everything.where(analysis.computed)) == list(kept)
    assert math.prod(X.shape) == kept["args/0"].forward.size
