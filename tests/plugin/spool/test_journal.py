"""The journal: what was noted last is read again, and nothing of what was noted only in part."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.spool.journal import FILE, SLOT_SIZE, Journal, JournalTakenError, segments_needed
from tests.plugin.spools import running_writer


def states(number: int) -> list[dict[str, object]]:
    return [{"writer": f"w{n}", "positions": {"a": n * 10}} for n in range(number)]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_last_state_is_read_again(tmp_path: Path, number: int) -> None:
    journal = Journal(tmp_path)
    journal.reserve()
    for state in states(number):
        journal.write(state)
    journal.close()
    journal = Journal(tmp_path)
    assert journal.state == states(number)[-1]
    journal.close()


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 255))
def test_a_state_that_was_not_written_completely_leaves_the_one_before(
    tmp_path_factory: pytest.TempPathFactory, number: int, at: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    for state in states(number):
        journal.write(state)
    journal.write({"writer": "last", "positions": {}})
    journal.close()
    slot = (number + 1) % 2 * SLOT_SIZE
    with (folder / FILE).open("r+b") as file:
        file.seek(slot)
        written = file.read(46)  # all of it: 16 bytes of head, 30 of content
        damaged = at % len(written)
        file.seek(slot + damaged)
        file.write(bytes([written[damaged] ^ flip]))
    journal = Journal(folder)
    assert journal.state == states(number)[-1]
    journal.close()


def test_a_second_process_cannot_open_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalTakenError):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_segments_behind_the_marks_of_an_unsettled_batch_are_needed(tmp_path: Path) -> None:
    assert not segments_needed(tmp_path)("q", "1-w-1.seg")
    journal = Journal(tmp_path)
    journal.write({"batches": [{"writer": "w", "marks": {"q": [5, 100]}}]})
    is_needed = segments_needed(tmp_path)
    assert is_needed("q", "00000000000000000001-w-5.seg")
    assert is_needed("q", "00000000000000000001-w-6.seg")
    assert not is_needed("q", "00000000000000000001-w-4.seg")
    assert not is_needed("q", "00000000000000000001-x-5.seg")
    assert not is_needed("other", "00000000000000000001-w-5.seg")
    journal.write({"batches": []})
    assert not segments_needed(tmp_path)("q", "00000000000000000001-w-5.seg")
    journal.close()


def test_a_mark_names_the_segment_and_the_size_behind_which_the_next_record_is(tmp_path: Path) -> None:
    with running_writer(tmp_path, name="w") as writer:
        queue = writer.queue("q")
        first, size = queue.mark
        assert size == 0
        writer.append_all([(queue, b"record", None, None)])
        writer.close(10)
    (path,) = (tmp_path / "queues" / "q").glob("*.seg")
    assert path.name.split("-")[1:] == ["w", f"{first}.seg"]
