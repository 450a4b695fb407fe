"""The parquet contract: what is written is read back, and what is wrong is named."""

import io
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cpt_rft.config.schema import DataConfig
from cpt_rft.data.example import Example
from cpt_rft.data.parquet import read_split, rows_hash, write_split
from cpt_rft.data.prepare import LOCK_NAME, check_prepared, prepare
from cpt_rft.errors import DataError
from cpt_rft.miniature.world import make_rows


@pytest.fixture
def rows() -> list[Example]:
    return make_rows("mini_gqa", "train", 3, 0)


def write_table(path: Path, rows: list[Example], column: str, values: list[object]) -> None:
    write_split(path, rows)
    table = pq.read_table(path)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.array(values, table.schema.field(column).type)), path)


def test_round_trip(tmp_path: Path, rows: list[Example]) -> None:
    rows = [replace(rows[0], meta={"source": ["a", 1]}), *rows[1:], *make_rows("mini_mmlu_pro", "test", 2, 0)]
    write_split(tmp_path / "x.parquet", rows)
    assert read_split(tmp_path / "x.parquet") == rows


def test_hash_sees_pixels_and_text_but_not_the_encoder(rows: list[Example]) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(rows[0].images[0])).save(buffer, format="PNG", compress_level=0)
    assert rows_hash([replace(rows[0], images=(buffer.getvalue(),)), *rows[1:]]) == rows_hash(rows)
    assert rows_hash([replace(rows[0], rationale="else"), *rows[1:]]) != rows_hash(rows)
    assert rows_hash([replace(rows[0], images=rows[1].images), *rows[1:]]) != rows_hash(rows)


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("answer", ["  ", "a", "b"], "row 0 .*empty"),
        ("answer", [None, "a", "b"], "row 0 .*empty"),
        ("answer", ["nobody", "a", "b"], "row 0 .*not among its references"),
        ("id", ["x", "y", "x"], "row 2 .*twice"),
        ("problem", ["<image>a", "no tag", "<image>c"], "row 1 .*0 <image> tags for 1 pictures"),
        ("kind", ["short_text", "essay", "short_text"], "row 1 .*essay"),
        ("split", ["train", "train", "exam"], "row 2 .*exam"),
        ("meta", ["{}", "{", "{}"], "row 1"),
    ],
)
def test_a_bad_cell_is_named(
    tmp_path: Path, rows: list[Example], column: str, values: list[object], complaint: str
) -> None:
    path = tmp_path / "bad.parquet"
    write_table(path, rows, column, values)
    with pytest.raises(DataError, match=complaint) as caught:
        read_split(path)
    assert "bad.parquet" in str(caught.value)
    assert caught.value.fix


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path, rows: list[Example]) -> None:
    path = tmp_path / "bad.parquet"
    write_split(path, [rows[0], replace(rows[1], images=(rows[1].images[0][:60],)), rows[2]])
    with pytest.raises(DataError, match=r"row 1 .*does not decode"):
        read_split(path)


def test_a_picture_under_28_pixels_is_named(tmp_path: Path, rows: list[Example]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (84, 27)).save(buffer, format="PNG")
    path = tmp_path / "bad.parquet"
    write_split(path, [replace(rows[0], images=(buffer.getvalue(),))])
    with pytest.raises(DataError, match="84 x 27 px"):
        read_split(path)


def test_a_picture_over_200_times_as_long_as_wide_is_named(tmp_path: Path, rows: list[Example]) -> None:
    for width, accepted in ((5600, True), (5601, False)):
        buffer = io.BytesIO()
        Image.new("RGB", (width, 28)).save(buffer, format="PNG")
        path = tmp_path / "row.parquet"
        write_split(path, [replace(rows[0], images=(buffer.getvalue(),))])
        if accepted:
            assert len(read_split(path)) == 1
        else:
            with pytest.raises(DataError, match=r"row 0 .*5601 x 28 px\. Fix: crop it to a ratio of at most 200"):
                read_split(path)


def test_missing_and_cut_files_are_named(tmp_path: Path, rows: list[Example]) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(DataError, match="does not exist"):
        read_split(path)
    write_split(path, rows)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable parquet"):
        read_split(path)
    write_split(path, rows)
    pq.write_table(pq.read_table(path).drop_columns(["rationale"]), path)
    with pytest.raises(DataError, match="no column rationale"):
        read_split(path)


def test_prepare_is_idempotent_and_locked(tmp_path: Path) -> None:
    config = DataConfig(train=4, dev=2, test=3, general=5)
    data = prepare(config, ["mini_gqa"], ["mini_pope"], tmp_path)
    assert data.rows == {
        "mini_gqa/train": 4,
        "mini_gqa/dev": 2,
        "mini_gqa/test": 3,
        "mini_pope/dev": 5,
        "mini_pope/test": 5,
    }
    before = (tmp_path / LOCK_NAME).read_bytes(), data.path("mini_gqa", "train").stat().st_mtime_ns
    assert prepare(config, ["mini_gqa"], ["mini_pope"], tmp_path) == data
    assert before == ((tmp_path / LOCK_NAME).read_bytes(), data.path("mini_gqa", "train").stat().st_mtime_ns)
    check_prepared(data)


def test_prepare_draws_no_split_that_is_not_asked_for(tmp_path: Path) -> None:
    config = DataConfig(train=4, dev=2, test=3, general=5)
    one = prepare(config, ["mini_gqa"], ["mini_pope"], tmp_path / "one", splits=("dev",))
    assert one.rows == {"mini_gqa/dev": 2, "mini_pope/dev": 5}
    assert {path.name for path in (tmp_path / "one").rglob("*.parquet")} == {"dev.parquet"}
    every = prepare(config, ["mini_gqa"], ["mini_pope"], tmp_path / "every")
    assert one.hashes.items() <= every.hashes.items()


def test_prepare_refuses_other_settings_in_the_same_directory(tmp_path: Path) -> None:
    prepare(DataConfig(train=4, dev=2, test=3), ["mini_gqa"], [], tmp_path)
    with pytest.raises(DataError, match="was made from"):
        prepare(DataConfig(train=5, dev=2, test=3), ["mini_gqa"], [], tmp_path)


def test_changed_rows_are_noticed(tmp_path: Path) -> None:
    data = prepare(DataConfig(train=4, dev=2, test=3), ["mini_gqa"], [], tmp_path)
    write_split(data.path("mini_gqa", "dev"), make_rows("mini_gqa", "dev", 2, 9))
    with pytest.raises(DataError, match="other rows than"):
        check_prepared(data)
