"""The fault suite: what goes wrong in earnest, while programs read; real processes, real kernel, a table at the end.

    make faults                          all cases, short; `ARGS="--long"` as the issue of reliability has the numbers,
    make faults ARGS="peers --json f"    cases whose name begins so; `--list` names them
    make test                            the same short cases, one test each (test_faults.py)

    supply.py    registry, the door before it that can be made faulty, images with known content: once for all
    scene.py     superpeers, nodes and mounts of one case (or of several that share a `Setting`)
    load.py      readers, processes of their own (reader.py), which compare each byte; what they count
    engines.py   in place of readers, for plain pulls, through the proxies of fleet.py: a "read" is a pull
    frame.py     Case, Bounds, and how one is run; table.py: the rows for people and programs

**How a case is written.** In a module of its own kind (`registries.py`, `peers.py` …, listed in `frame.MODULES`), a
function that does the injury, and an entry in the module's CASES:

    def full_disk(run: Run) -> int:
        run.scene.nodes[0] …          what is there: superpeers, nodes, supply.door; each has kill(), start(), status()
        with run.load():              readers of `run.layers`, which nobody has read in this scene
            … injure …                run.pick(short, long) chooses a number, run.chance is seeded
            run.reads_go_on()         waits until readers get bytes again: what must be true after the injury
        return …                      how often it hurt; a case that returns 0 has shown nothing and fails

    CASES = [Case("disk-full", "disk: full", full_disk, Setting(nodes=1, …), Bounds(longest=30))]

Cases in a row with an equal Setting share a scene, each with `layers` (1) that nobody has read; `alone=True`: a scene
of its own. A case leaves what it has killed alive again, so that all can be unmounted.

Bounds: no failed read (unless `failed=None`), never a wrong byte, how long a read may wait at most. They are checked
after the function has returned; then every mount is taken down, and what is left behind fails the case too.
"""
