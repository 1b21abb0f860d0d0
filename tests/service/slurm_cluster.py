"""A real Slurm on this machine: munged, slurmctld, and a slurmd on each of several machines that are namespaces.

The machines have networks and processes of their own, as Ray wants it, and share this one's files. Debian's packages
are installed where they are missing and may be.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.service.namespaces import HERE, Machine, Network

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONF = """
ClusterName=test
SlurmctldHost={host}({here})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=46817
SlurmdPort=46818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
"""
START_S = 60.0


def why_not() -> str | None:
    """What keeps Slurm from running here, None when nothing does. It is installed first if it can be."""
    if os.geteuid() != 0:
        return "munged and slurmd are started as root"
    if all(map(shutil.which, PROGRAMS)):
        return None
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "slurm-wlm", "munge"]):
        done = subprocess.run(command, capture_output=True, text=True, env=quiet)
        if done.returncode != 0:
            return f"Slurm is not here, and `{' '.join(command)}` fails: {done.stderr.strip()[-300:]}"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"there is no {missing[0]}" if missing else None


class SlurmCluster:
    """`nodes` machines of `cpus` each, in one partition. `close` leaves nothing of it."""

    def __init__(self, folder: Path, *, nodes: int, cpus: int) -> None:
        self.folder, self.network = folder, Network(folder)
        self._here: list[subprocess.Popen[bytes]] = []
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._begin(nodes, cpus)
        except BaseException:
            self.close()
            raise

    def _begin(self, nodes: int, cpus: int) -> None:
        folder = self.folder
        self.machines = [self.network.add() for _ in range(nodes)]
        for name in ("munge", "state", *(f"spool-{self.name(machine)}" for machine in self.machines)):
            (folder / name).mkdir(mode=0o755)
        folder.chmod(0o755)
        lines = [CONF.format(folder=folder, here=HERE, host=os.uname().nodename)]
        lines += [f"NodeName={self.name(each)} NodeAddr={each.address} CPUs={cpus}" for each in self.machines]
        lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # which asks for no mount; nothing uses it
        self._munge()
        self._start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for machine in self.machines:
            self.start_slurmd(machine)
        self.wait_until(lambda: self.say("sinfo", "--noheader", "--format=%t").split() == ["idle"], "no idle nodes")

    def name(self, machine: Machine) -> str:
        return f"n{machine.address.rpartition('.')[2]}"

    def start_slurmd(self, machine: Machine) -> None:
        """A slurmd that sees its own processes alone; a shell is the first of them and takes in what others leave."""
        inside = f"slurmd -D -N {self.name(machine)} -f {self.folder}/slurm.conf & wait"
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inside]
        self.network.start(machine, command, dict(self.env), self.folder / f"{self.name(machine)}.out")

    def say(self, *command: str) -> str:
        """What a command of Slurm says."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def facts(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.say("scontrol", "show", "job", "--oneliner", job)))

    def wait_until(self, true, otherwise: str, seconds: float = START_S) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                if true():
                    return
            except subprocess.CalledProcessError:  # not there yet
                pass
            assert time.monotonic() < until, f"{otherwise}\n{(self.folder / 'slurmctld.log').read_text()[-3000:]}"
            time.sleep(0.5)

    def close(self) -> None:
        self.network.close()
        for process in reversed(self._here):
            process.send_signal(signal.SIGKILL)
            process.wait()

    def _munge(self) -> None:
        place = self.folder / "munge"
        key = place / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": place / "socket", "pid-file": place / "pid", "log-file": place / "log",
                 "seed-file": place / "seed"}  # fmt: skip
        self._start("munged", "--foreground", "--num-threads=2", *(f"--{name}={path}" for name, path in files.items()))
        self.wait_until((place / "socket").exists, "no munged")

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as said:
            self._here.append(subprocess.Popen(command, env=self.env, stdout=said, stderr=said, start_new_session=True))
