"""The corpus, its token cache and the tokenizers: same text, same digest, same tokens; other text, other cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.training import fallback
from tools.training.cache import open_cache
from tools.training.corpus import HELD_OUT, Document, digest, open_corpus, standard_library_corpus
from tools.training.errors import ProgramError
from tools.training.tokens import BPETokenizer, ByteTokenizer, StreamDecoder, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """45 small files in nested folders, made in an order that is not the sorted one."""
    root = tmp_path / "data"
    for i in reversed(range(45)):
        path = root / f"part{i % 3}" / f"file{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"file {i}: {'ä' * i}\n".encode() * 3)
    return root


def test_folder_split_is_by_file_sorted_and_every_twentieth(folder: Path) -> None:
    corpus = open_corpus(str(folder))
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert [d.name for d in corpus.validation] == names[::HELD_OUT]
    assert [d.name for d in corpus.training] == [n for i, n in enumerate(names) if i % HELD_OUT]
    assert corpus.text("validation") == b"".join((folder / n).read_bytes() for n in names[::HELD_OUT])
    assert corpus.text("training", 10) == (folder / names[1]).read_bytes()[:10]


def test_digest_depends_on_names_and_bytes_and_on_nothing_else(folder: Path) -> None:
    before = open_corpus(str(folder)).sha256
    some = folder / "part0" / "file00.txt"
    some.touch()
    (folder / ".hidden").write_text("not part of it")
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0")
    assert open_corpus(str(folder)).sha256 == before
    some.write_bytes(some.read_bytes() + b"!")
    changed = open_corpus(str(folder)).sha256
    some.rename(some.with_name("other.txt"))
    assert len({before, changed, open_corpus(str(folder)).sha256}) == 3


def test_one_file_is_cut_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(1000)))
    corpus = open_corpus(str(path))
    training, validation = corpus.text("training"), corpus.text("validation")
    assert training + validation == path.read_bytes()
    assert training.endswith(b"\n")
    assert len(validation) == pytest.approx(len(path.read_bytes()) / HELD_OUT, abs=10)


def test_standard_library_without_sources_falls_back_to_generated_text(tmp_path: Path) -> None:
    (tmp_path / "os.pyc").write_bytes(b"\0")
    corpus = standard_library_corpus(tmp_path)
    assert corpus.description.startswith("generated text")
    assert corpus.sha256 == standard_library_corpus(tmp_path).sha256
    # The generator's text is part of the program: a change of Python must not change it.
    name, text = next(fallback.documents(1))
    assert (name, len(text) > 1000, text[:4]) == ("generated_0000.py", True, b"def ")


def test_standard_library_leaves_out_installed_packages_and_tests(tmp_path: Path) -> None:
    for name in ["a.py", *(f"json/m{i:03d}.py" for i in range(60)), "site-packages/x.py", "test/test_a.py"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
    corpus = standard_library_corpus(tmp_path)
    assert len(corpus.training) + len(corpus.validation) == 61
    assert not any("x.py" in d.name or "test" in d.name for d in (*corpus.training, *corpus.validation))


@pytest.mark.parametrize("content, message", [(None, "no such file or folder"), (b"short", "5 bytes are too few")])
def test_unusable_data_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProgramError, match=message):
        open_corpus(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProgramError, match="no text files"):
        open_corpus(str(tmp_path / "empty"))


def test_cache_holds_the_text_and_is_reused(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(str(folder))
    first = open_cache(corpus, tmp_path / "cache")
    assert bytes(first.training) == corpus.text("training")
    assert bytes(first.validation) == corpus.text("validation")
    written = (first.folder / "training.tokens").stat().st_mtime_ns
    again = open_cache(corpus, tmp_path / "cache")
    assert again.folder == first.folder
    assert (again.folder / "training.tokens").stat().st_mtime_ns == written
    assert not again.training.flags.writeable


def test_cache_follows_the_content(folder: Path, tmp_path: Path) -> None:
    first = open_cache(open_corpus(str(folder)), tmp_path / "cache")
    path = folder / "part1" / "file01.txt"
    path.write_bytes(b"changed" + path.read_bytes())
    corpus = open_corpus(str(folder))
    second = open_cache(corpus, tmp_path / "cache")
    assert second.folder != first.folder
    assert bytes(second.training) == corpus.text("training")


def test_damaged_cache_is_made_again(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(str(folder))
    entry = open_cache(corpus, tmp_path / "cache").folder
    for damage in (lambda: (entry / "training.tokens").write_bytes(b"cut"), lambda: (entry / "facts.json").unlink()):
        damage()
        assert bytes(open_cache(corpus, tmp_path / "cache").training) == corpus.text("training")
    assert json.loads((entry / "facts.json").read_text())["corpus_sha256"] == corpus.sha256
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [entry.name]  # no temporary is left behind


def test_byte_pair_tokens_give_the_text_back(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    corpus = open_corpus(str(folder))
    cache = open_cache(corpus, tmp_path / "cache", vocab=280)
    tokenizer = cache.tokenizer
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.decode(cache.validation) == corpus.text("validation")
    assert tokenizer.byte_lengths()[cache.validation].sum() == len(corpus.text("validation"))
    assert len(cache.training) < len(corpus.text("training"))
    loaded = load_tokenizer(cache.folder)
    assert np.array_equal(loaded.encode("file ä\n".encode()), tokenizer.encode("file ä\n".encode()))
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_byte_pair_tokens_lose_no_byte() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train([b"ab ab \xe4 ab\n" * 20], 260)

    @given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
    @settings(max_examples=100, deadline=None)
    def goes_round(text: bytes) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths()[ids].sum() == len(text)

    goes_round()


@pytest.mark.parametrize("names", [("VERSION", "b.txt"), ("one.txt",)])
def test_too_little_text_is_one_line(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in names:
        (root / name).write_text("1" if name != "b.txt" else "text\n" * 500)
    with pytest.raises(ProgramError, match=r"the part for .* has [01] tokens, expected at least 2"):
        open_cache(open_corpus(str(root)), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_file_names_need_not_be_utf8() -> None:
    digests = {digest([Document(os.fsdecode(name), lambda: b"text")]) for name in (b"\xff.txt", b"\xfe.txt", b"a.txt")}
    assert len(digests) == 3


@given(text=st.text(), data=st.data())
@settings(max_examples=50, deadline=None)
def test_streaming_decoder_never_splits_a_character(text: str, data: st.DataObject) -> None:
    encoded, decoder, shown = text.encode(), StreamDecoder(), ""
    while encoded:
        size = data.draw(st.integers(1, len(encoded)))
        shown += decoder.push(encoded[:size])
        assert text.startswith(shown)
        encoded = encoded[size:]
    assert shown + decoder.finish() == text
