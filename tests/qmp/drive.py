"""Drives a QMP server with mirror jobs, by the library that QEMU's own tests use, and says what came of it.

    drive.py SOCKET FOLDER DEVICE...

Each scene has a device and a target of its own. What came of the scenes is one JSON object on stdout: for each
the steps in turn, what was asked with its answer, and what was heard of the job meanwhile. Nothing here knows which
server it is.
"""

import asyncio
import json
import sys

from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError

PATIENCE = 60
# Slow enough that a job is still under way when it is told something.
SLOW = 1 << 16


class Scene:
    """One job of one device, and what is heard of it."""

    def __init__(self, client, name, device, folder):
        self.client = client
        self.job = name
        self.device = device
        self.target = f"{folder}/{name}.qcow2"
        self.steps = []

    async def ask(self, command, **arguments):
        """Asks, and notes the answer; what an error says is part of it."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            answer = await self.client.execute(command, arguments)
            self.steps.append([command, "ok"])
            return answer
        except ExecuteError as error:
            self.steps.append([command, error.error_class, str(error)])
            return None

    async def start(self, **arguments):
        await self.ask(
            "drive-mirror",
            device=self.device,
            target=self.target,
            sync="full",
            job_id=self.job,
            **arguments,
        )

    async def hear(self, last):
        """Listens until the job's status, or the name of an event, is `last`; notes all that it hears of it."""
        heard = []
        while not heard or heard[-1] != last:
            try:
                event = await asyncio.wait_for(self.client.events.get(), PATIENCE)
            except asyncio.TimeoutError:
                self.steps.append(["heard no " + last, heard])
                raise
            data = event["data"]
            if self.job not in (data.get("id"), data.get("device")) or event["event"].startswith("BLKMIRROR"):
                continue
            assert event["timestamp"]["seconds"] > 0, event
            heard.append(data.get("status", event["event"]))
            if "error" in data:
                heard.append("error")
        self.steps.append(["heard", heard])

    async def look(self, *names):
        """Notes what the queries say of the job."""
        jobs = await self.client.execute("query-jobs")
        block_jobs = await self.client.execute("query-block-jobs")
        found = [job for job in jobs if job["id"] == self.job]
        found += [job for job in block_jobs if job["device"] == self.job]
        self.steps.append(["look", [{name: job[name] for name in names if name in job} for job in found]])

    async def rests(self):
        """Notes whether the job rests, and says it."""
        jobs = await self.client.execute("query-jobs")
        rests = any(job["id"] == self.job and job["status"] in ("paused", "standby") for job in jobs)
        self.steps.append(["rests", rests])
        return rests


async def pivot(scene):
    await scene.start()
    await scene.hear("BLOCK_JOB_READY")
    await scene.look("status", "ready", "paused", "io-status", "auto-finalize", "auto-dismiss", "type")
    await scene.ask("block-job-complete", device=scene.job)
    await scene.hear("null")
    await scene.look("status")
    await scene.ask("block-job-complete", device=scene.job)
    await scene.ask("job-complete", id=scene.job)


async def cancel_when_ready(scene):
    await scene.start()
    await scene.hear("BLOCK_JOB_READY")
    await scene.ask("block-job-cancel", device=scene.job)
    await scene.hear("null")


async def cancel_before_ready(scene):
    await scene.start(speed=SLOW)
    await scene.hear("running")
    await scene.ask("block-job-complete", device=scene.job)
    await scene.ask("job-finalize", id=scene.job)
    await scene.ask("job-dismiss", id=scene.job)
    await scene.ask("block-job-cancel", device=scene.job)
    await scene.hear("null")


async def force_when_ready(scene):
    await scene.start(auto_dismiss=False)
    await scene.hear("BLOCK_JOB_READY")
    await scene.ask("job-cancel", id=scene.job)
    await scene.hear("concluded")
    await scene.look("status", "error")
    await scene.ask("job-dismiss", id=scene.job)
    await scene.hear("null")


async def pause(scene):
    await scene.start(speed=SLOW)
    await scene.hear("running")
    await scene.ask("job-pause", id=scene.job)
    await scene.hear("paused")
    await scene.look("status", "paused", "busy")
    await scene.ask("job-pause", id=scene.job)
    await scene.ask("block-job-set-speed", device=scene.job, speed=0)
    await scene.look("speed")
    await scene.ask("job-resume", id=scene.job)
    await scene.hear("BLOCK_JOB_READY")
    await scene.ask("block-job-resume", device=scene.job)
    await scene.ask("block-job-pause", device=scene.job)
    await scene.hear("standby")
    await scene.look("status", "paused", "ready")
    await scene.ask("block-job-resume", device=scene.job)
    await scene.hear("ready")
    await scene.ask("block-job-cancel", device=scene.job, force=True)
    await scene.hear("null")


async def by_hand(scene):
    await scene.start(auto_finalize=False, auto_dismiss=False)
    await scene.hear("BLOCK_JOB_READY")
    await scene.ask("block-job-complete", device=scene.job)
    await scene.hear("BLOCK_JOB_PENDING")
    await scene.look("status", "auto-finalize", "auto-dismiss", "error")
    await scene.ask("block-job-complete", device=scene.job)
    await scene.ask("block-job-dismiss", id=scene.job)
    await scene.ask("block-job-finalize", id=scene.job)
    await scene.hear("concluded")
    await scene.look("status", "error")
    await scene.ask("job-finalize", id=scene.job)
    await scene.ask("job-pause", id=scene.job)
    await scene.ask("block-job-set-speed", device=scene.job, speed=1)
    await scene.ask("job-dismiss", id=scene.job)
    await scene.hear("null")
    await scene.ask("job-dismiss", id=scene.job)
    await scene.ask("block-job-dismiss", id=scene.job)


async def pending_given_up(scene):
    await scene.start(auto_finalize=False)
    await scene.hear("BLOCK_JOB_READY")
    await scene.ask("block-job-cancel", device=scene.job)
    await scene.hear("BLOCK_JOB_PENDING")
    await scene.ask("job-cancel", id=scene.job)
    await scene.hear("null")


async def names(scene):
    await scene.start(auto_dismiss=False, speed=SLOW)
    await scene.hear("running")
    await scene.start()
    await scene.ask("job-cancel", id=scene.job)
    await scene.hear("concluded")
    await scene.start()
    await scene.ask("job-dismiss", id=scene.job)
    await scene.hear("null")
    scene.job = "1st"
    await scene.start()
    await scene.ask("job-pause", id="none")
    await scene.ask("block-job-pause", device="none")
    await scene.ask("no-such-command")
    await scene.ask("block-job-pause")
    await scene.ask("block-job-pause", device=1)
    await scene.ask("block-job-pause", device="none", more=1)
    await scene.ask("drive-mirror", device="none", target=scene.target, sync="full", job_id="a")


async def complete_while_paused(scene):
    await scene.start()
    await scene.hear("BLOCK_JOB_READY")
    await scene.ask("job-pause", id=scene.job)
    await scene.hear("standby")
    await scene.ask("job-complete", id=scene.job)
    if await scene.rests():
        await scene.ask("job-resume", id=scene.job)
    await scene.hear("null")


async def cancel_while_paused(scene):
    await scene.start(speed=SLOW)
    await scene.hear("running")
    await scene.ask("job-pause", id=scene.job)
    await scene.hear("paused")
    if await scene.ask("block-job-cancel", device=scene.job) is None:
        await scene.ask("block-job-cancel", device=scene.job, force=True)
    await scene.hear("null")


SCENES = [
    pivot,
    cancel_when_ready,
    cancel_before_ready,
    force_when_ready,
    pause,
    by_hand,
    pending_given_up,
    names,
    complete_while_paused,
    cancel_while_paused,
]


async def main(socket, folder, *devices):
    client = QMPClient("drive")
    await client.connect(socket)
    came = {}
    for scene, device in zip(SCENES, devices, strict=True):
        name = scene.__name__.replace("_", "-")
        acted = Scene(client, name, device, folder)
        came[name] = acted.steps
        try:
            await scene(acted)
        except asyncio.TimeoutError:
            pass
    came["schema"] = await client.execute("query-qmp-schema")
    came["greeting"] = client.greeting._asdict()
    await client.disconnect()
    json.dump(came, sys.stdout)


asyncio.run(main(*sys.argv[1:]))
