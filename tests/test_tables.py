"""The one reader of tables: every dress of the same rows, and what it refuses."""

import json

import pytest

from emollama_jax import tables
from emollama_jax.errors import UserError

ROWS = [("a/1.jpg", "happy"), ('b "two".jpg', "sad\nor tired"), ("c;d,e|f\tg.jpg", "")]


def dressed(separator, *, end="\n", space=""):
    def quote(cell):
        return '"' + cell.replace('"', '""') + '"'

    joint = f"{separator}{space}"
    lines = [joint.join(("path", "label")), *(joint.join(map(quote, row)) for row in ROWS)]
    return end.join(lines) + end


def read(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return tables.read_rows(path)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_and_line_ends(tmp_path, separator, end):
    found = read(tmp_path / "list.csv", dressed(separator, end=end))
    assert [(row["path"], row["label"]) for _, row in found] == ROWS
    assert [line for line, _ in found] == [2, 3, 5]  # the second label holds a line break


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: ("\n \n" + text.replace("\n", "\n\n", 1)).encode(),
        lambda _: ("sep=;\r\n" + dressed(";")).encode(),
    ],
    ids=["utf-8 mark", "utf-16", "utf-16 big", "utf-32", "blank lines", "Excel's first line"],
)
def test_marks_and_blank_lines(tmp_path, encode):
    found = read(tmp_path / "list.csv", encode(dressed(",", space=" ")))
    assert [(row["path"], row["label"]) for _, row in found] == ROWS


def test_json_is_a_table_too(tmp_path):
    objects = [dict(zip(("path", "label"), row, strict=True)) for row in ROWS]
    lines = read(tmp_path / "a", "\n".join(map(json.dumps, objects)))
    assert [row for _, row in lines] == objects and lines[2][0] == 3
    assert read(tmp_path / "b", json.dumps(objects, indent=1)) == lines


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("path,label,label\na,b,c\n", "line 1: 2 columns are called 'label'"),
        ("\npath; x;path \na;b;c\n", "line 2: 2 columns are called 'path'"),
        ('{"path": "a", "label": "b", "label": "c"}\n', "line 1: .*key 'label' is given twice"),
        ('[{"path": "a", "path": "b"}]', "the key 'path' is given twice"),
        ("path,label\na,b\na,b,c\n", "line 3: 3 cells under a header of 2"),
        ('path,label\n"a\nb",c\nd\n', "line 4: 1 cells under a header of 2"),
        ('path,label\na,"b\n', "line 2: broken CSV"),
        ("path,label\na,Ü\n".encode("latin-1"), "not UTF-8 text .*save the file as UTF-8"),
        ("path,label\na,b\n".encode("utf-16-le"), "UTF-16 without a mark"),
        (b"PK\x03\x04 and more", "Excel workbook, wanted text: save the sheet as CSV"),
    ],
)
def test_what_is_refused(tmp_path, data, said):
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / "list.csv", data)
    assert "\n" not in str(caught.value)


def test_nameless_columns_are_left_out(tmp_path):
    """What pandas writes: an index without a name."""
    assert read(tmp_path / "list.csv", ",path,label\n0,a,b\n") == [(2, {"path": "a", "label": "b"})]


def test_a_cell_may_be_long(tmp_path):
    """A picture of 400 × 400 pixels is one cell of half a megabyte."""
    assert len(read(tmp_path / "a", "pixels\n" + "255 " * 160_000)[0][1]["pixels"]) > 500_000
