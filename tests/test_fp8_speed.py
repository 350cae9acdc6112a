"""The FP8 benchmark: that it runs through, and that the gallery says what it found."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.fp8_speed.measure import grouped
from experiments.fp8_speed.model import NAMES
from experiments.fp8_speed.report import RECORD, draw, table, tables, with_tables
from experiments.fp8_speed.run import PARTS, SpeedConfig, run

GALLERY = Path(__file__).parents[1] / "experiments" / "README.md"
PLAIN, UNIT, FP8 = (NAMES[kind] for kind in ("bf16", "bf16 unit", "fp8 unit"))


@pytest.mark.filterwarnings("ignore:native FP8 formats on")
def test_one_part_runs_through_and_leaves_the_others(tmp_path, capsys):
    out = tmp_path / "speed.json"
    other = {"device": "a GPU", "jax": "1", "result": {"times": {PLAIN: {"ms": 1.0}}}}
    out.write_text(json.dumps({"layers": other}))
    kinds = ("bf16", "bf16 unit", "fp8 unit")
    record = run(SpeedConfig(parts=("linear",), kinds=kinds, out=out, smoke=True))
    assert json.loads(out.read_text()) == record and record["layers"] == other
    about = record["linear"]
    assert about["config"]["smoke"] and about["platform"] == "cpu" and about["command"]
    times = about["result"]["times"]
    assert [*times][:3] == [PLAIN, UNIT, FP8] and len(times) == 4
    assert all(m["ms"] > 0 and m["products"] == 3 for m in times.values())
    assert all("multiplications" in m for m in times.values())
    printed = capsys.readouterr().out
    assert table(times) in printed and "layers: a GPU, jax 1" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:native FP8 formats on")
def test_everything_runs_through(tmp_path):
    record = run(SpeedConfig(out=tmp_path / "speed.json", smoke=True))
    assert [*record] == [*PARTS]
    assert len(record["sweep"]["result"]["points"]) == 1
    training = record["train"]["result"]["times"]
    assert [*training] == [PLAIN, UNIT, FP8]
    assert all(len(m["losses"]) == 4 for m in training.values())
    shared = {"ms", "compile_s", "temporary_gib", "fp8", "products", "multiplications"}
    for part in ("linear", "layers", "train"):
        assert all(shared <= {*m} for m in record[part]["result"]["times"].values())
    assert all((tmp_path / name).exists() for name in ("speed.png", "train.png"))


def test_the_gallery_says_what_the_record_says():
    record, page = json.loads(RECORD.read_text()), GALLERY.read_text()
    assert with_tables(page, record) == page, (
        "run `python -m experiments.fp8_speed.report --gallery experiments/README.md`"
    )
    found = tables(record)
    assert len(found) == 6 and all(rows in page for rows in found.values())


def test_pictures_are_drawn_of_the_record(tmp_path):
    draw(json.loads(RECORD.read_text()), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["speed.png", "train.png"]


def test_tables_are_put_behind_their_names():
    record = {"linear": {"result": {"times": {PLAIN: {"ms": 2.0}, FP8: {"ms": 1.0}}}}}
    rows = (
        "|  | ms (quartiles) | against bfloat16 |\n| --- | --- | --- |\n"
        f"| {PLAIN} | 2.00 | 1.00 |\n| {FP8} | 1.00 | 2.00 |"
    )
    for old in ("", "| old |\n|---|\n| 3 |\n\n"):
        page = f"a\n\n<!-- fp8_speed: linear -->\n\n{old}b | c\n"
        new = f"a\n\n<!-- fp8_speed: linear -->\n\n{rows}\n\nb | c\n"
        assert with_tables(page, record) == new == with_tables(new, record)


def test_the_roofline_says_where_the_time_goes():
    kernels = {"nvjet_sm90": 4.0, "cudnn_sdpa": 2.0, "kernel__1": 1.0, "loop_add": 3.0}
    assert list(grouped(kernels).values()) == [4.0, 2.0, 1.0, 3.0]
    layers = {
        "times": {PLAIN: {"ms": 20.0}, FP8: {"ms": 10.0}},
        "kernels": {FP8: kernels},
        "roofline": {
            "floor": {"products": 3.5, "attention": 1.5, "casts": 2.0},
            "tflops": {"fp8": 1500.0, "bf16": 750.0},
            "copy_tb_per_s": 4.0,
        },
    }
    rows = tables({"layers": {"result": layers}})["where the time goes"].splitlines()
    assert "1500 TFLOPS, attention 750, 4.0 TB/s" in rows[0]
    assert rows[2:] == [
        "| products | 4.0 | 3.5 |",
        "| attention | 2.0 | 1.5 |",
        "| our kernels | 1.0 |  |",
        "| all else | 3.0 |  |",
        "| casts, in the two above |  | 2.0 |",
        "| together | 10.0 | 7.0 |",
    ]


def test_bad_configurations_are_refused(monkeypatch, tmp_path):
    config = SpeedConfig(out=tmp_path / "speed.json")
    with pytest.raises(ValueError, match="`parts` must be of .* got .'roofline'."):
        run(dataclasses.replace(config, parts=("roofline",)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="`kinds` has 'fp8 qwix'"):
        run(config)
    assert not config.out.exists()
