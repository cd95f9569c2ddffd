from __future__ import annotations

from pretrain import power_log
from pretrain.power_log import newest_readings, newest_stretch, read_power

HEADER = "time,step,phase,gpu,power_w,utilization,temperature_c,sm_clock_mhz,memory_clock_mhz,throttle\n"


def rows(seconds):
    return "".join(
        f"{1000 + second}.5,{second},forward,{gpu},{100 * gpu + second}.0,97.0,,1980,2619,none\n"
        for second in seconds
        for gpu in (0, 1)
    )


def test_no_file_is_no_reading(tmp_path):
    assert newest_readings(tmp_path) == [] and read_power(tmp_path) == [] and newest_stretch(tmp_path, 60) == []


def test_the_newest_line_of_each_device(tmp_path):
    (tmp_path / "power.csv").write_text(HEADER + rows(range(1000)) + "2000.5,1000,forward,0,9")
    first, second = newest_readings(tmp_path)
    assert first == {
        "device": "GPU 0",
        "time": 1999.5,
        "phase": "forward",
        "power_w": 999.0,
        "utilization": 97.0,
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "throttle": "none",
    }
    assert (second["device"], second["power_w"]) == ("GPU 1", 1099.0)


def test_lines_and_columns_of_another_version_are_passed_over(tmp_path):
    text = 'time,gpu,power_w,fan\n1.0,cpu,12,x\noops,cpu,13,1\n2.0,,13,1\n3.0,cpu,nan,1\n4.0\n"\n'
    (tmp_path / "power.csv").write_text(text)
    assert read_power(tmp_path) == [
        {"time": 1.0, "gpu": "cpu", "power_w": 12.0},
        {"time": 3.0, "gpu": "cpu", "fan": 1.0},
    ]
    assert newest_readings(tmp_path)[0]["device"] == "CPU"
    (tmp_path / "power.csv").write_text("")
    assert read_power(tmp_path) == []


def test_of_a_long_run_evenly_spaced_stretches_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(power_log, "BLOCKS", 20)
    monkeypatch.setattr(power_log, "BLOCK_BYTES", 512)
    monkeypatch.setattr(power_log, "WHOLE_BYTES", 20 * 512)
    (tmp_path / "power.1.csv").write_text(HEADER + rows(range(100)))
    (tmp_path / "power.csv").write_text(HEADER + rows(range(100, 10_000)))
    found = read_power(tmp_path)
    steps = [reading["step"] for reading in found]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] > 9400
    assert 200 < len(found) < 600
    assert all(reading["power_w"] == 100 * int(reading["gpu"]) + reading["step"] for reading in found)  # no torn line
    assert {reading["step"] for reading in newest_stretch(tmp_path, 3)} == {9996, 9997, 9998, 9999}
