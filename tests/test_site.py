"""Archives of a site: what is begun is gone on with, what changed is begun again, and a hand may put them there."""

import pytest

from cpt_rft.data import site
from cpt_rft.data.retry import Patience
from cpt_rft.data.site import fetch_archive
from cpt_rft.errors import DataError
from tests.helpers.hub import Fault, Hub

CONTENT = bytes(range(256)) * 40
PATH = "/site/train.zip"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(site, "PATIENCE", Patience(attempts=3, base_s=0.01))
    with Hub() as running:
        running.site[PATH] = CONTENT
        yield running


def fetch(hub: Hub, tmp_path):
    return fetch_archive(hub.endpoint + PATH, tmp_path / "archives", "images")


def test_an_archive_is_fetched_once(hub, tmp_path):
    file = fetch(hub, tmp_path)
    assert file.path.read_bytes() == CONTENT
    assert (file.part, file.name, file.size) == ("images", hub.endpoint + PATH, len(CONTENT))
    assert fetch(hub, tmp_path) == file
    assert hub.requests == [f"GET {PATH}"]
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["train.zip", "train.zip.json"]


def test_a_cut_download_goes_on_where_it_ended(hub, tmp_path):
    hub.faults = [Fault(PATH, "cut", at=3000)]
    assert fetch(hub, tmp_path).path.read_bytes() == CONTENT
    assert hub.requests == [f"GET {PATH}", f"GET {PATH} bytes=3000-"]


def test_a_download_that_was_given_up_goes_on_in_the_next_run(hub, tmp_path):
    hub.faults = [Fault(PATH, "cut", at=3000), Fault(PATH, "status", status=503, times=-1)]
    with pytest.raises(DataError, match=r"503.*by any means and put it at .*train.zip"):
        fetch(hub, tmp_path)
    hub.faults = []
    assert fetch(hub, tmp_path).path.read_bytes() == CONTENT
    assert hub.requests[-1] == f"GET {PATH} bytes=3000-"


def test_a_changed_file_is_begun_again(hub, tmp_path):
    hub.faults = [Fault(PATH, "cut", at=3000, times=3)]
    with pytest.raises(DataError, match="cut after"):
        fetch(hub, tmp_path)
    hub.site[PATH] = CONTENT[::-1]
    assert fetch(hub, tmp_path).path.read_bytes() == CONTENT[::-1]


def test_a_range_that_begins_elsewhere_is_not_appended(hub, tmp_path):
    hub.faults = [Fault(PATH, "cut", at=3000), Fault(PATH, "misplaced")]
    assert fetch(hub, tmp_path).path.read_bytes() == CONTENT


def test_a_site_without_ranges_is_begun_again(hub, tmp_path):
    hub.ranges = False
    hub.faults = [Fault(PATH, "cut", at=3000)]
    assert fetch(hub, tmp_path).path.read_bytes() == CONTENT


def test_an_archive_put_there_by_hand_is_taken(hub, tmp_path):
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "train.zip").write_bytes(b"by hand")
    assert fetch(hub, tmp_path).size == 7
    assert hub.requests == []


def test_offline_names_the_manual_route(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE.*put it at"):
        fetch(hub, tmp_path)
    assert hub.requests == []


def test_an_archive_that_is_gone_is_asked_for_once(hub, tmp_path):
    hub.site.clear()
    with pytest.raises(DataError, match=r"404.*put it at"):
        fetch(hub, tmp_path)
    assert len(hub.requests) == 1


def test_nothing_is_begun_where_the_disk_is_too_small(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("cpt_rft.data.space.SPARE_BYTES", 2**60)
    with pytest.raises(DataError, match="GB are free"):
        fetch(hub, tmp_path)
    assert not list((tmp_path / "archives").glob(".*.part"))
