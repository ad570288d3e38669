"""An archive asked about through a running server."""

import csv

from listen.archive import WINDOWS, ask, rows_without_a_table, write_archive
from serve.conftest import NAMED
from serve.requests_to_server import KEY

from mergekit_bio.engine.interface import EngineSettings


def test_a_server_answers_as_transformers_does_and_the_table_names_its_model(server, tmp_path):
    archive, name = write_archive(tmp_path / "archive"), NAMED[0]
    settings = EngineSettings(servers=(server.url,), api_key=KEY)
    ask(name, archive, tmp_path / "birds.csv", engine="http", settings=settings)
    with (tmp_path / "birds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = rows_without_a_table(server.sweep[name], archive)
    assert [(row["recording"], float(row["start"])) for row in rows] == [row[:2] for row in expected]
    # Half a character at the end may be left out of the server's text.
    wanted = [text.rstrip("\ufffd ") for *_, text in expected]
    assert [row["answer"].rstrip("\ufffd ") for row in rows] == wanted
    assert {row["model"] for row in rows} == {name} and len(rows) == len(WINDOWS)
