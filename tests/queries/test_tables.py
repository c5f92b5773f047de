"""Views are made when a query names them, and however it names them they are there."""

import threading

import duckdb
import pytest

from lm_telemetry.catalogue import TABLES
from lm_telemetry.queries import connect, list_views


@pytest.fixture
def con(store, put):
    put("steps", 1, loss=[1.5])
    return connect(store.path)


def made(con):
    """Views that DuckDB has, asked past the connection that would make them."""
    found = con._raw.execute("SELECT schema_name, view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    return {name if schema == "main" else f"{schema}.{name}" for schema, name in found}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("SELECT 1", set()),
        ("SELECT loss FROM steps", {"steps"}),
        ('SELECT loss FROM "STEPS"', {"steps"}),
        ("FROM raw.steps", {"steps"}),
        ("FROM edge_onset", {"edge_onset", "edge_of_stability", "curvature", "steps", "runs"}),
        ("DESCRIBE steps", {"steps"}),
    ],
)
def test_only_what_a_query_takes_is_made(con, query, names):
    con.execute(query).fetchall()
    mains = {name for name in made(con) if not name.startswith("raw.")}
    assert names <= mains if "edge_onset" in names else mains == names
    assert len(mains) < len(TABLES)


@pytest.mark.parametrize(
    "ask",
    [
        lambda con: con.sql("SELECT loss FROM steps").fetchall(),
        lambda con: con.table("steps").project("loss").fetchall(),
        lambda con: con.view("steps").project("loss").fetchall(),
        lambda con: con.query("FROM steps SELECT loss").fetchall(),
        lambda con: con.execute(con.extract_statements("SELECT loss FROM steps")[0]).fetchall(),
        lambda con: con.execute("SELECT loss FROM query_table('st' || 'eps')").fetchall(),
        lambda con: con.execute("SELECT loss FROM query('FROM st' || 'eps')").fetchall(),
        lambda con: con.execute("SELECT loss FROM steps WHERE step = ?", [1]).fetchall(),
        lambda con: con.cursor().execute("SELECT loss FROM steps").fetchall(),
    ],
)
def test_a_table_is_there_however_it_is_named(con, ask):
    assert ask(con) == [(1.5,)]


@pytest.mark.parametrize("query", ["SHOW TABLES", "SHOW ALL TABLES", "DESCRIBE", "DESCRIBE;", "PRAGMA show_tables"])
def test_a_listing_has_all(con, query):
    names = {*TABLES, *(view.name for view in list_views())}
    assert names <= {value for row in con.execute(query).fetchall() for value in row if isinstance(value, str)}


def test_the_information_schema_has_all(con):
    (count,) = con.execute("SELECT count(*) FROM information_schema.tables WHERE table_schema = 'main'").fetchone()
    assert count == len(TABLES) + len(list_views())


def test_a_name_that_is_nowhere_is_duckdb_s_error(con):
    with pytest.raises(duckdb.CatalogException, match='Did you mean "training"'):
        con.execute("FROM trainign")


def test_what_a_script_has_done_is_not_done_again(con):
    con.execute("CREATE TABLE kept (a INTEGER)")
    with pytest.raises(duckdb.CatalogException):
        con.execute("INSERT INTO kept VALUES (1); FROM query_table('lay' || 'erz')")
    assert con.execute("SELECT count(*) FROM kept").fetchone() == (1,)


def test_a_view_that_is_made_follows_the_files(con, put):
    assert con.execute("SELECT count(*) FROM training").fetchone() == (1,)
    put("steps", 2, loss=[1.0])
    put("layers", 2, layer=[0])
    assert con.execute("SELECT count(*) FROM training").fetchone() == (2,)
    assert con.execute("SELECT count(*) FROM layers").fetchone() == (1,)


def test_threads_ask_at_once(con):
    found, failed = [], []

    def ask(name):
        try:
            with con.cursor() as cursor:
                for view in list_views():
                    cursor.execute(f"SELECT count(*) FROM {view.name}").fetchall()
                found.append(cursor.execute("SELECT loss FROM steps").fetchall())
        except Exception as error:  # noqa: BLE001 a thread's error is shown below
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, failed) == ([[(1.5,)]] * 4, [])
