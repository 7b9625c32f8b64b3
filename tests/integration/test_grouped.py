"""The nodes of a rack join by one of themselves: a real superpeer's directory, real nodes without FUSE, over loopback.

What delegates do wrong costs no read: all nodes get all bytes whatever happens to the one that is asked.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import web

from dadi import http
from dadi.errors import Conflict, TokenRefused, Unavailable
from dadi.peers import desk as desks
from dadi.peers import group as groups
from dadi.peers import grouped
from dadi.peers.health import Settings as Patience
from dadi.peers.places import Heartbeat, Join, JoinAnswer, Peer, Place, Told
from tests.lab.rack import ALL, BLOB, DATA, FixedTokens, Node, Rack, rack_of
from tests.lab.waiting import until


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_PATIENCE", 10.0)  # a busy machine is no silent delegate


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[Rack]:
    async with rack_of(tmp_path) as made:
        yield made


async def test_a_rack_joins_by_one_of_its_nodes_and_the_superpeer_sees_one_join(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    await rack.read()
    assert rack.joins == 2, "one for each blob"
    delegate, second = rack.delegates()
    assert set(delegate.asked) == {"join"}
    assert len(delegate.asked) == ALL - 1
    assert not second.asked
    assert sum(not node.place().parents for node in rack.nodes.values()) == 1
    for node in rack.nodes.values():
        assert not node.kinds(), "nothing fell back"
        for parent in node.place().parents:
            assert parent.address == rack.nodes[parent.id].peer.address
    rack.check_no_cycle()
    for node in rack.nodes.values():
        await node.beat()
    assert delegate.asked.count("heartbeat") == ALL - 1
    assert rack.peers.heartbeats == 1, "of the root, which is all that the superpeer hears"


async def test_a_delegate_that_is_gone_is_passed_over_and_said(rack: Rack) -> None:
    await rack.add(ALL)
    first, second = rack.delegates()
    await first.hang_up()
    others = rack.others(first)
    await rack.start(*others)
    await rack.read(*others)
    assert rack.joins == 2
    assert all(node.kinds() == {"delegate passed over": 1} for node in others)
    assert len(second.asked) == ALL - 2


async def test_without_any_delegate_all_join_at_the_superpeer(rack: Rack) -> None:
    await rack.add(ALL)
    for delegate in rack.delegates():
        await delegate.hang_up()
    others = rack.others(*rack.delegates())
    await rack.start(*others)
    await rack.read(*others)
    assert rack.joins == 2 * len(others)
    rack.check_no_cycle()


async def test_a_delegate_that_dies_later_is_followed_by_the_next_which_is_told_all(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    first, second = rack.delegates()
    before = {name: node.place().parents[:1] for name, node in rack.nodes.items()}
    await first.hang_up()
    others = rack.others(first)
    for node in others:
        await node.beat()
    for node in others:
        assert node.place().parents[:1] == before[node.name], "nobody moves because of it"
    assert second.desk.directory.statistics()["nodes"] == len(others)
    await rack.read(*others)
    rack.check_no_cycle()


async def test_when_the_last_delegate_dies_its_mates_join_at_the_superpeer(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    delegates = rack.delegates()
    for delegate in delegates:
        await delegate.hang_up()
    others = rack.others(*delegates)
    for node in others:
        await node.beat()
    assert all(node.desk.group.has_outer_place(BLOB.digest) for node in others)
    peers = rack.peers
    assert {row["id"] for row in peers.directory.tree(BLOB.digest)} >= {node.name for node in others}
    await rack.read(*others)
    rack.check_no_cycle()


async def test_a_delegate_that_is_restarted_knows_all_again_after_a_heartbeat(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    first = rack.delegates()[0]
    before = {name: node.place() for name, node in rack.nodes.items()}
    first.desk.directory = type(first.desk.directory)(first.desk.directory.settings, now=time.time())
    for node in rack.nodes.values():
        await node.beat()
    assert {name: node.place() for name, node in rack.nodes.items()} == before
    rows = {row["id"]: row["parent"] for row in first.desk.directory.tree(BLOB.digest)}
    assert rows == {name: (place.parents[0].id if place.parents else "") for name, place in before.items()}
    assert rack.joins == 2


async def _refuse(request: web.Request) -> web.Response | None:
    raise Unavailable("short of memory", retry_after=5)


async def _nonsense(request: web.Request) -> web.Response | None:
    return web.Response(body=b'{"places": 7}')


async def _silence(request: web.Request) -> web.Response | None:
    await asyncio.sleep(30)  # longer than anybody waits for it
    return None


@pytest.mark.parametrize("how", [_refuse, _nonsense, _silence], ids=["refuses", "nonsense", "silence"])
async def test_a_delegate_that_is_of_no_use_costs_a_moment_and_no_read(
    rack: Rack, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how is _silence:
        monkeypatch.setattr(grouped, "_PATIENCE", 0.3)
    await rack.add(5)
    first, second = rack.delegates()
    first.before = how
    others = rack.others(first)
    await rack.start(*others)
    await rack.read(*others)
    assert all(node.kinds()["delegate passed over"] for node in others)
    assert second.asked


async def test_a_delegate_that_lies_leads_nowhere_but_to_mates(rack: Rack) -> None:
    await rack.add(5)
    first = rack.delegates()[0]
    strangers = (Peer("stranger", "127.0.0.1:9"), Peer("n0", "127.0.0.1:9"), Peer("n1", "127.0.0.1:9"))

    async def lie(request: web.Request) -> web.Response:
        said = msgspec.json.decode(await request.read(), type=Join)
        places = {blob: Place(9, 2, strangers) for blob in said.blobs}
        return web.Response(body=msgspec.json.encode(JoinAnswer(places, 3600.0)), content_type="application/json")

    first.before = lie
    others = rack.others(first)
    for node in others:  # they may now wait for each other: nobody does so for long
        node.parents.health.settings = Patience(margin=0.2, longest=0.3)
    await rack.start(*others)
    for node in others:
        assert node.directory.heartbeat_every < 60, "the pace is the superpeer's"
        for parent in node.place().parents:
            assert parent.address == rack.nodes[parent.id].peer.address
    await rack.read(*others)


async def test_parents_are_shown_no_token_unless_they_have_proved_that_they_hold_it(rack: Rack) -> None:
    await rack.add(6, token="the token of all")
    first = rack.delegates()[0]
    odd, *others = rack.others(first)
    odd.directory._tokens = FixedTokens("another token")
    await rack.start(odd, *others, first)
    assert odd.desk.group.has_outer_place(BLOB.digest), "it is the first, so the root"
    inner = [node for node in (*others, first) if not node.desk.group.has_outer_place(BLOB.digest)]
    assert inner, "who is asked for a place after the first that could not check its parent"
    for node in inner:
        assert odd.name not in {parent.id for parent in node.place().parents}, "the superpeer may say so, no mate"
    proofs = first.desk._proofs[BLOB.digest]
    assert proofs[others[0].name] == groups.proof("the token of all", others[0].name)
    await rack.read()


async def test_nobody_but_mates_at_their_own_address_is_heard(rack: Rack) -> None:
    await rack.add(4)
    desk = rack.nodes["n0"].desk
    url = f"http://{rack.nodes['n0'].peer.address}/v1/peers"
    stranger = Peer("stranger", "127.0.0.1:9", "z", "r")
    async with http.client() as session:

        async def post(verb: str, said: msgspec.Struct) -> None:
            async with http.request(session, "POST", f"{url}/{verb}", "asking", data=msgspec.json.encode(said)):
                pass

        for verb, said in (("join", Join(stranger, (BLOB.digest,))), ("heartbeat", Heartbeat(stranger))):
            with pytest.raises(Conflict, match="not known as a member"):
                await post(verb, said)
        assert rack.nodes["n0"].directory._soon.is_set(), "it asks the superpeer whether that is a new mate"
        desk.group.learn(9, [*desk.group.mates.values(), Peer("far", "10.1.1.1:1")])
        with pytest.raises(Conflict):
            await post("join", Join(Peer("far"), (BLOB.digest,)))
    assert desk.directory.statistics()["nodes"] == 0


async def test_who_has_just_come_up_waits_until_its_delegate_has_heard_of_it(
    rack: Rack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "_STRANGER", 10.0)
    await rack.add(5)
    await rack.start()
    asking: list[asyncio.Task[None]] = []
    for node in rack.nodes.values():
        node.desk.unknown = lambda node=node: asking.append(asyncio.create_task(node.directory.introduce()))
    late = rack.nodes["late"] = Node(rack, "late")
    await late.serve()
    await late.directory.introduce()
    assert all("late" not in node.desk.group.mates for node in rack.others(late))
    before = rack.joins
    await rack.start(late)
    assert rack.joins == before, "it is no second root"
    assert late.place().parents
    assert not late.kinds()
    assert await late.read() == DATA
    await asyncio.gather(*asking)


async def test_strangers_do_not_wait_in_any_number(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "_STRANGER", 60.0)
    monkeypatch.setattr(desks, "_MOST_STRANGERS", 0)
    await rack.add(4)
    late = rack.nodes["late"] = Node(rack, "late")
    await late.serve()
    await late.directory.introduce()
    await rack.start(late)
    assert late.kinds()["delegate passed over"]
    assert late.place() is not None, "of the superpeer"


async def test_a_delegate_that_is_in_another_group_now_takes_nobodys_word_and_its_mates_go_on(rack: Rack) -> None:
    await rack.add(6)
    await rack.start()
    first = rack.delegates()[0]
    left = [node.peer for node in rack.others(first)]
    for node in rack.nodes.values():
        node.desk.group.learn(99, left)
    for node in rack.nodes.values():
        await node.beat()
        rows = (await node.directory.trees([BLOB.digest]))[BLOB.digest]
        assert node.name in {row["id"] for row in rows}
    inner = [node for node in rack.nodes.values() if not node.desk.group.has_outer_place(BLOB.digest)]
    assert inner
    assert all(node.desk.group.placed_by(BLOB.digest) != first.name for node in inner)
    await rack.read()
    rack.check_no_cycle()


@pytest.mark.parametrize("verb", ["join", "heartbeat", "leave"])
async def test_what_is_no_message_is_refused_and_changes_nothing(rack: Rack, verb: str) -> None:
    await rack.add(4)
    node = rack.nodes["n0"]
    url = f"http://{node.peer.address}/v1/peers/{verb}"
    hostile = [b"", b"{", b"[]", b'{"id": 7}', b"\xff", b"[" * 5000, b'{"peer": {"id": ""}, "blobs": []}',
               b" " * (2 << 20), b'{"peer": {"id": "n1"}, "blobs": ["../etc"]}']  # fmt: skip
    async with http.client() as session:
        for body in hostile:
            async with session.post(url, data=io.BytesIO(body)) as response:
                assert response.status == 400, body[:50]
    assert node.desk.directory.statistics()["nodes"] == 0


async def test_a_node_that_has_joined_nothing_leaves_its_group_without_a_token(rack: Rack) -> None:
    await rack.add(4)

    async def no_token(headers: Any, *blobs: str) -> None:
        raise TokenRefused("a token is needed, and none was shown")

    rack.peers.gate = SimpleNamespace(admit=no_token)
    node = rack.nodes["n0"]
    await node.directory.leave()
    assert len(rack.peers.groups) == 3
    assert not node.kinds()


async def test_groups_are_back_one_introduction_after_the_superpeer_was_restarted(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.runner.cleanup()
    await rack.superpeer_starts()
    for node in rack.nodes.values():
        await node.directory.introduce()
    assert len(rack.peers.groups) == ALL
    for node in rack.nodes.values():
        await node.directory.introduce()
        assert len(node.desk.group.mates) == ALL
    await rack.start()
    assert rack.joins == 2


async def test_groups_stay_while_no_superpeer_answers(rack: Rack) -> None:
    await rack.add(4)
    node = rack.nodes["n1"]
    node.superpeers._static = ["http://127.0.0.1:9"]
    node.superpeers._update()
    await node.directory.introduce()
    assert len(node.desk.group.mates) == 4
    assert node.kinds()


async def test_a_node_says_who_it_is_when_it_starts_and_leaves_when_it_stops(rack: Rack) -> None:
    await rack.add(0)
    node = rack.nodes["n0"] = Node(rack, "n0")
    await node.serve()
    node.directory.start()
    peers = rack.peers
    await until(lambda: len(peers.groups))
    assert node.peer.id in {mate.id for mate in (peers.groups.find("n0"),) if mate}
    await node.directory.close()
    await node.directory.leave()
    assert len(peers.groups) == 0


async def test_two_nodes_of_a_rack_join_at_the_superpeer_as_ever(rack: Rack) -> None:
    await rack.add(2)
    await rack.start()
    await rack.read()
    assert rack.joins == 4
    assert not any(node.asked for node in rack.nodes.values())
    one, two = rack.nodes.values()
    assert [parent.id for parent in two.place().parents] == [one.name]


async def test_what_is_shown_of_a_tree_is_the_superpeers_part_and_that_of_the_rack(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    for node in rack.others(*rack.delegates())[:1] + rack.delegates():
        rows = (await node.directory.trees([BLOB.digest]))[BLOB.digest]
        assert {row["id"] for row in rows} == set(rack.nodes)
        assert Counter(row["parent"] for row in rows)[""] == 1
    told = rack.delegates()[0].directory.statistics()
    assert told["group"]["members"] == ALL
    assert told["group"]["joins"] == ALL


async def test_a_parent_that_dies_is_replaced_by_the_delegate(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    root = next(node for node in rack.nodes.values() if not node.place().parents)
    child = next(node for node in rack.nodes.values() if node.place().parents[:1] == (node_peer(root),))
    await root.hang_up()
    await rack.read(child)
    await until(lambda: root.name not in {parent.id for parent in child.place().parents})
    rack.check_no_cycle()


def node_peer(node: Node) -> Peer:
    return groups.outward(node.peer)


async def test_what_a_delegate_is_told_of_a_superpeers_place_is_a_root(rack: Rack) -> None:
    await rack.add(4)
    await rack.start()
    first = rack.delegates()[0]
    root = next(node for node in rack.nodes.values() if not node.place().parents)
    beat = Heartbeat(root.peer, blobs=(Told(BLOB.digest, 5, 4, ("n9",)),))
    await root.directory.heartbeat(beat)
    row = next(row for row in first.desk.directory.tree(BLOB.digest) if row["id"] == root.name)
    assert (row["parent"], row["depth"]) == ("", 1)
