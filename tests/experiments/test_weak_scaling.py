"""The studies of weak scaling keep what they have compiled; the programs themselves are stand-ins here."""
import json

from experiments.weak_scaling import run
from experiments.weak_scaling_decoder import run as decoder
from vlm_jax.sharding.topologies import parse_topology


def test_done_programs_are_kept(tmp_path, monkeypatch):
    compiled = []

    def measure(file, topology, rows):
        compiled.append((file, topology, rows))
        return {"chips": parse_topology(topology).size, "bytes": 5.0, "bytes_by_axis": {"fsdp": 5.0}, "fits": True}
    monkeypatch.setattr(run, "measure", measure)
    run.run(tmp_path, "command", {"a": "file"}, ["v5e-8"], 3)
    run.run(tmp_path, "command", {"a": "file"}, ["v5e-8", "v5e-32"], 3)
    written = json.loads((tmp_path / "results.json").read_text())
    assert compiled == [("file", "v5e-8", 3), ("file", "v5e-32", 3)] and written["metrics"] == {"a_bytes_8_chips": 5, "a_bytes_32_chips": 5}


def test_topologies_of_the_decoder_exist():
    assert [parse_topology(name).size for name in decoder.TOPOLOGIES] == [8, 64, 256, 1024]
