"""Counting by host stays small however many hosts there are."""

from __future__ import annotations

from pipeline.telemetry.host_stats import OTHERS, Hosts, HostStatus


def test_the_hosts_with_most_samples_are_told_and_the_others_together() -> None:
    hosts = Hosts()
    for number in range(20_000):
        hosts.add(f"http://h{number}.example/x", "failed", "dns")
        hosts.add("http://large.example:8080/y", "kept" if number % 4 else "failed", "" if number % 4 else "http_500")
    hosts.add("cat/17.jpg", "kept", "")
    large, *_, others = hosts.statuses(3)
    assert large == HostStatus("large.example", 20_000, 15_000, "http_500 5000")
    assert others.host == OTHERS
    assert sum(status.asked for status in hosts.statuses(10_000)) == 40_000
    assert len(hosts.said(10_000)) <= 5001


def test_what_is_no_url_has_a_host_of_its_own() -> None:
    hosts = Hosts()
    hosts.add("http://[::1", "failed", "bad_url")
    hosts.add("javascript://alert", "failed", "bad_url")
    assert {status.host for status in hosts.statuses(5)} == {"?", "alert"}
