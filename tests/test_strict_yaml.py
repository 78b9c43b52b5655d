"""What `load_yaml` says of a bad file: always the file, and the line and the key where it can."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from conserve_sgl.errors import InputError
from conserve_sgl.strict_yaml import load_yaml


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tokens: int
    share: float = 0.5


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    tags: list[str] = []


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str = ""
    limits: Limits | None = None
    items: list[Item] = []


@pytest.fixture
def file(tmp_path):
    """Writes a file and returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "given.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_yaml(path, Document)
    assert caught.value.path == path
    assert str(caught.value).startswith(str(path))
    return caught.value


def test_a_good_file(file):
    path = file("title: é\nlimits: {tokens: 3}\nitems:\n- name: a\n  tags: [x, y]\n")
    assert load_yaml(path, Document) == Document("é", Limits(3), [Item("a", ["x", "y"])])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="nothing"),
        pytest.param("\n\n", id="blank lines"),
        pytest.param("# nothing yet\n", id="a comment"),
        pytest.param("---\n", id="an empty document"),
    ],
)
def test_an_empty_file_is_all_defaults(file, content):
    assert load_yaml(file(content), Document) == Document()


@pytest.mark.parametrize(
    ("content", "line", "key", "reason"),
    [
        pytest.param("titel: x", 1, "titel", "unknown key", id="unknown key"),
        pytest.param(
            "title: x\nlimits:\n  tokens: 1\n  tokns: 2",
            4,
            "limits.tokns",
            "unknown key",
            id="unknown key in a section",
        ),
        pytest.param(
            "items:\n- name: a\n- name: b\n  tag: c",
            4,
            "items[1].tag",
            "unknown key",
            id="unknown key in a list",
        ),
        pytest.param("a.b: 1", 1, "a.b", "unknown key", id="unknown key with a dot"),
        pytest.param(
            "title: x\n\nlimits:\n  tokens: many",
            4,
            "limits.tokens",
            "expected `int`, got `str`",
            id="text where a number is expected",
        ),
        pytest.param(
            "limits: {tokens: 1.5}", 1, "limits.tokens", "expected `int`", id="a fraction of one"
        ),
        pytest.param(
            "limits: {tokens: '3'}", 1, "limits.tokens", "got `str`", id="a number in quotes"
        ),
        pytest.param("limits: {tokens: yes}", 1, "limits.tokens", "got `bool`", id="yes"),
        pytest.param("limits: {tokens: 2024-12-05}", 1, "limits.tokens", "got `date`", id="a date"),
        pytest.param(
            "limits:\n  tokens: 1\n  share: 1e-1",
            3,
            "limits.share",
            "expected `float`, got `str`",
            id="what YAML 1.1 takes for text",
        ),
        pytest.param("title: 7", 1, "title", "expected `str`, got `int`", id="a number as text"),
        pytest.param("title:", 1, "title", "expected `str`, got `null`", id="a key without value"),
        pytest.param(
            "title: x\nlimits:\n  share: 1.0",
            2,
            "limits",
            "missing required field `tokens`",
            id="a missing key",
        ),
        pytest.param(
            "items:\n- name: a\n- tags: []",
            3,
            "items[1]",
            "missing required field `name`",
            id="a missing key in a list",
        ),
        pytest.param(
            "items:\n- name: a\n  tags:\n  - x\n  - 3",
            5,
            "items[0].tags[1]",
            "expected `str`, got `int`",
            id="a bad element of a list in a list",
        ),
        pytest.param("title: a\ntitle: b", 2, "title", "is given twice", id="a repeated key"),
        pytest.param(
            "limits:\n  tokens: 1\n  tokens: 1",
            3,
            "limits.tokens",
            "is given twice",
            id="a repeated key in a section",
        ),
        pytest.param(
            "items:\n- name: a\n- {name: b, name: c}",
            3,
            "items[1].name",
            "is given twice",
            id="a repeated key in a list",
        ),
        pytest.param("limits:\n- tokens: 1", 1, "limits", "got `array`", id="a list for a section"),
        pytest.param("limits: 3", 1, "limits", "got `int`", id="a number for a section"),
        pytest.param("items: {name: a}", 1, "items", "got `object`", id="a section for a list"),
    ],
)
def test_names_line_and_key(file, content, line, key, reason):
    error = refused(file(content))
    assert (error.line, error.key) == (line, key)
    assert reason in error.reason
    assert str(error) == f"{error.path}:{line}: {key}: {error.reason}"


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        pytest.param("- a\n- b", 1, "expected `object`, got `array`", id="a list"),
        pytest.param("just words", 1, "expected `object`, got `str`", id="a text"),
        pytest.param("title: a: b", 1, "is not YAML", id="two colons"),
        pytest.param("title: x\nlimits:\n\ttokens: 3", 3, "is not YAML", id="a tab"),
        pytest.param("title: x\nitems: [a", 2, "is not YAML", id="a bracket left open"),
        pytest.param("title: *nobody", 1, "undefined alias", id="an alias of nothing"),
        pytest.param("title: a\n---\ntitle: b", 2, "another document", id="two documents"),
        pytest.param("title: x\nlimits: !new {}", 2, "tag", id="a tag that nobody knows"),
        pytest.param(
            "title: !!python/object/apply:os.getcwd []", 1, "tag", id="a tag that would run code"
        ),
    ],
)
def test_names_the_line_where_there_is_no_key(file, content, line, reason):
    error = refused(file(content))
    assert (error.line, error.key) == (line, None)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"title: \xff\xfe", "is not UTF-8 text", id="not UTF-8"),
        pytest.param("title: é".encode("latin-1"), "is not UTF-8 text", id="Latin-1"),
        pytest.param("title: \x07", "is not YAML", id="a control character"),
        pytest.param("title: \x00", "is not YAML", id="a null character"),
    ],
)
def test_names_the_file_where_there_is_no_line(file, content, reason):
    assert reason in refused(file(content)).reason


def test_a_byte_order_mark_is_no_fault(file):
    assert load_yaml(file("\ufefftitle: x"), Document).title == "x"


def test_an_alias_is_no_fault(file):
    path = file("items:\n- &a {name: x, tags: [t]}\n- *a\n")
    assert load_yaml(path, Document).items == [Item("x", ["t"])] * 2


def test_a_merged_section_is_no_repeated_key(file):
    path = file("items:\n- &a {name: x, tags: [t]}\n- {<<: *a, name: y}\n")
    assert load_yaml(path, Document).items[1] == Item("y", ["t"])


def test_a_file_that_is_not_there(tmp_path):
    assert "cannot be read: No such file" in refused(tmp_path / "none.yaml").reason


def test_a_folder(tmp_path):
    assert "cannot be read: Is a directory" in refused(tmp_path).reason


def test_a_path_may_be_a_string(file):
    assert load_yaml(str(file("title: x")), Document).title == "x"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        pytest.param("title: x\nlimits: {tokens: 2024-13-45}", 2, id="a date that is none"),
        pytest.param("title: x\nlimits: {tokens: !!int many}", 2, id="a tag that does not fit"),
        pytest.param("title: x\nlimits: {tokens: !!bool many}", 2, id="a truth that is none"),
        pytest.param("title: x\n? [a, b]\n: 1", 2, id="a list as a key"),
        pytest.param("title: x\n{a: b}: 1", 2, id="a mapping as a key"),
        pytest.param("title: x\nlimits:\n  tokens: 1\n  1: 2", 4, id="a number as a key"),
        pytest.param("title: x\nlimits:\n  tokens: 1\n  yes: 2", 4, id="a truth as a key"),
        pytest.param("title: x\nlimits: &a {tokens: *a}", None, id="an alias inside itself"),
        pytest.param("title: x\nlimits: " + "[" * 5000 + "]" * 5000, None, id="nested too deep"),
    ],
)
def test_a_document_that_yaml_reads_and_we_do_not(file, content, line):
    error = refused(file(content))
    assert error.line == line
    assert "at `key`" not in str(error)
