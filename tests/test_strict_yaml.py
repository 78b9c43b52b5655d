"""What `load_yaml` says of a bad file: always the file, and the line and the key where it can."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        pytest.param(
            "titel: x",
            1,
            "titel",
            "unknown key; there are title, limits and items",
            id="unknown key",
        ),
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
            "must be a whole number, not the text 'many'",
            id="text where a number is expected",
        ),
        pytest.param(
            "limits: {tokens: 1.5}",
            1,
            "limits.tokens",
            "a whole number, not 1.5",
            id="a fraction of one",
        ),
        pytest.param(
            "limits: {tokens: '3'}",
            1,
            "limits.tokens",
            "as a number it is written 3",
            id="a number in quotes",
        ),
        pytest.param("limits: {tokens: yes}", 1, "limits.tokens", "not true", id="yes"),
        pytest.param(
            "limits: {tokens: 2024-12-05}",
            1,
            "limits.tokens",
            "not a date: 2024-12-05",
            id="a date",
        ),
        pytest.param(
            "limits:\n  tokens: 1\n  share: 1e-1",
            3,
            "limits.share",
            "must be a number, not the text '1e-1'; as a number it is written 0.1",
            id="what YAML 1.1 takes for text",
        ),
        pytest.param(
            "title: 7",
            1,
            "title",
            "must be text, not 7; in quotes it is text",
            id="a number as text",
        ),
        pytest.param("title:", 1, "title", "must be text, not null", id="a key without value"),
        pytest.param(
            "title: x\nlimits:\n  share: 1.0",
            2,
            "limits",
            "needs the key tokens, a whole number",
            id="a missing key",
        ),
        pytest.param(
            "items:\n- name: a\n- tags: []",
            3,
            "items[1]",
            "needs the key name, text",
            id="a missing key in a list",
        ),
        pytest.param(
            "items:\n- name: a\n  tags:\n  - x\n  - 3",
            5,
            "items[0].tags[1]",
            "must be text, not 3",
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
        pytest.param(
            "limits:\n- tokens: 1",
            1,
            "limits",
            "a section of keys (tokens, share) or null, not a list",
            id="a list for a section",
        ),
        pytest.param("limits: 3", 1, "limits", "not 3", id="a number for a section"),
        pytest.param(
            "items: {name: a}",
            1,
            "items",
            "must be a list, not a section of keys",
            id="a section for a list",
        ),
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
        pytest.param(
            "- a\n- b",
            1,
            "must be a section of keys (title, limits, items), not a list",
            id="a list",
        ),
        pytest.param("just words", 1, "not the text 'just words'", id="a text"),
        pytest.param("title: a: b", 1, "is not YAML", id="two colons"),
        pytest.param("title: x\nlimits:\n\ttokens: 3", 3, "is not YAML", id="a tab"),
        pytest.param("title: x\nitems: [a", 2, "is not YAML", id="a bracket left open"),
        pytest.param("title:\n \x07", 2, "is not YAML: holds the character 0x7", id="a bell"),
        pytest.param("title: \0", 1, "is not YAML: holds the character 0x0", id="a null character"),
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
        pytest.param("title: x\nlimits: &a {tokens: *a}", 2, id="an alias inside itself"),
        pytest.param("title: x\nlimits: " + "[" * 5000 + "]" * 5000, 2, id="nested too deep"),
        pytest.param("title: x\nlimits: " + "{a: " * 100_000, 2, id="nested far too deep"),
        pytest.param("- " * 5000 + "a", 1, id="a list in a list in a list"),
        pytest.param("title: x\nlimits: {tokens: !!int ''}", 2, id="no number at all"),
        pytest.param("title: x\nlimits: {share: !!float ''}", 2, id="no fraction at all"),
        pytest.param("title: x\nlimits: {share: !!timestamp abc}", 2, id="no time at all"),
        pytest.param(
            "title: x\nlimits: {share: 0001-01-01 00:00:00 +23:59}", 2, id="before all times"
        ),
        pytest.param("title: x\nlimits: {share: .inf}", 2, id="infinity"),
        pytest.param("title: x\nlimits: {share: -.inf}", 2, id="infinity below"),
        pytest.param("title: x\nlimits: {share: .nan}", 2, id="no number"),
        pytest.param("title: x\nlimits: {share: 1.0e+300}", 2, id="a number beyond all use"),
        pytest.param("title: x\nlimits: {tokens: 1" + "0" * 22 + "}", 2, id="23 digits"),
        pytest.param("title: x\nlimits: {tokens: 1" + "0" * 5000 + "}", 2, id="5001 digits"),
        pytest.param('title: x\nitems: [{name: "\\ud800"}]', 2, id="half of a character"),
        pytest.param('title: x\nitems: [{name: "a\\0b"}]', 2, id="a NUL in a text"),
        pytest.param('title: x\n"\\ud800": 1', 2, id="half of a character in a key"),
        pytest.param('title: "\\UFFFFFFFF"', 1, id="a character beyond all"),
        pytest.param(
            "title: x\n? !!str [a]\n: 1", 2, id="a list that is said to be text, as a key"
        ),
    ],
)
def test_a_document_that_yaml_reads_and_we_do_not(file, content, line):
    error = refused(file(content))
    assert error.line == line
    assert "at `key`" not in str(error)


def bomb(levels: int, width: int, last: str = "") -> str:
    """Aliases of aliases: a few lines that stand for `width ** levels` values."""
    lines = ["a0: &a0 [x]"]
    for n in range(1, levels + 1):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]")
    return "\n".join([*lines, last])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(bomb(9, 9), id="ten lines of nine"),
        pytest.param(bomb(40, 2), id="doubled forty times"),
        pytest.param(bomb(2000, 1), id="a chain"),
        pytest.param(
            "\n".join(
                [
                    "a0: &a0 {k: v}",
                    *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)),
                ]
            ),
            id="merged twice, sixty times",
        ),
    ],
)
def test_aliases_are_not_written_out_without_bound(file, content):
    error = refused(file(content))
    assert error.reason == "aliases make it too large"
    assert error.line > 1


def test_many_values_without_an_alias_are_no_fault(file):
    assert len(load_yaml(file("items:\n" + "- {name: a}\n" * 3000), Document).items) == 3000


def test_a_deep_chain_of_aliases_is_read(file):
    assert "unknown key" in refused(file(bomb(300, 1))).reason


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800"])
def test_a_name_that_no_file_can_have(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(InputError, match="cannot be read"):
        load_yaml(path, Document)


_SIGNS = "[]{}:,-?&*!|>'\"%@`#~\n\t \\\0é\x85\u2028"
_TAGS = ["int", "float", "set", "timestamp", "binary", "omap", "pairs", "str", "bool", "null"]
_VALUES = ["1", "1.5", "0x", "1:2", "1e9", ".inf", "2024-12-05", "null", "yes", "=", "\\ud800"]
_MORE = [
    "\\U",
    "title",
    "tokens",
    "!x ",
    "&a ",
    "*a",
    "<<: ",
    "a: ",
    "- ",
    "\n  ",
    "---\n",
    "...\n",
]
PIECES = st.sampled_from([*_SIGNS, *(f"!!{tag} " for tag in _TAGS), *_VALUES, *_MORE])


@given(st.lists(PIECES, max_size=40).map("".join))
@settings(max_examples=500, deadline=None)
def test_whatever_a_file_holds_ends_in_a_value_or_in_one_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(content, encoding="utf-8", newline="")
    with contextlib.suppress(InputError):
        assert isinstance(load_yaml(path, Document), Document)
