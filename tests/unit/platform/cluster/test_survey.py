"""What `everstep doctor --address` makes of what a cluster told."""

from __future__ import annotations

from msgspec.structs import replace

from everstep.platform.cluster.survey import ClusterFacts, NodeReport, judge

GOOD = NodeReport("a", 4, 0, "1.0", "2.13", "3.11.7", 2 << 30)
FACTS = ClusterFacts("http://h:8265", "2.60", [GOOD, replace(GOOD, name="b")], "http://h:8265")


def verdicts(facts: ClusterFacts) -> dict[str, tuple[str, str, str]]:
    return {one.name: (one.verdict, one.found, one.fix) for one in judge(facts, "1.0", "2.60")}


def test_a_good_cluster_is_good():
    found = verdicts(FACTS)
    assert {verdict for verdict, _, _ in found.values()} == {"ok"}
    assert "2 nodes, 8 CPUs, 0 GPUs" in found["nodes"][1]
    assert "everstep 1.0, torch 2.13" in found["node b"][1]


def test_every_trouble_has_a_verdict_and_a_fix():
    for change, verdict, said in (
        ({"everstep": "0.9"}, "fail", "everstep 0.9, here 1.0"),
        ({"everstep": ""}, "fail", "has no everstep"),
        ({"torch": "2.12"}, "fail", "torch 2.12, another node 2.13"),
        ({"shm_free_bytes": 64 << 20}, "warn", "64.0 MiB of /dev/shm"),
        ({"problem": "gone"}, "fail", "does not answer: gone"),
    ):
        found = verdicts(replace(FACTS, nodes=[GOOD, replace(GOOD, name="b", **change)]))
        assert found["node a"][0] == "ok"
        assert found["node b"][0] == verdict
        assert said in found["node b"][1]
        assert found["node b"][2]
    assert verdicts(replace(FACTS, job_server=""))["job server"][0] == "warn"
    assert verdicts(replace(FACTS, ray="2.61"))["cluster's ray"][1] == "2.61, here 2.60"
    assert verdicts(replace(FACTS, problem="exit 127: not found"))["cluster's everstep"][0] == "fail"
