"""CRI, as kubelet speaks it to containerd: a small client, and the image that holds a pod's namespaces.

What lives here: one method for each call that tests make, blocking, each with an end. What never does: assertions, and
how containerd is configured and started.
"""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from tests.lab import images, oci_layout
from tests.lab.oci_layout import Image, Layout
from tests.lab.processes import LabFailed
from tests.lab.proto import cri_pb2 as pb
from tests.lab.proto import cri_pb2_grpc

TIMEOUT = 60.0
"""Seconds that a call may take."""
_BASE, _HEADERS = 0x400000, 64 + 56
_PAUSE = {
    # pause(), again and again
    "amd64": (62, bytes.fromhex("b822000000 0f05 ebf7")),
    # ppoll(NULL, 0, NULL, NULL): there is no pause()
    "arm64": (183, struct.pack("<7I", 0xD2800928, 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD4000001,
                               0x17FFFFFA)),
}  # fmt: skip
"""By architecture: its number in an ELF header, and a program that waits until it is killed."""


class Cri:
    """The CRI services behind containerd's socket; use it as a context manager. All methods raise LabFailed.

    `images`: the socket for the image service, if that is another one (kubelet's --image-service-endpoint).
    """

    def __init__(self, socket: Path, images: Path | None = None) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_http_proxy", 0)])
        self._other = grpc.insecure_channel(f"unix:{images or socket}", options=[("grpc.enable_http_proxy", 0)])
        self._runtime = cri_pb2_grpc.RuntimeServiceStub(self._channel)
        self._images = cri_pb2_grpc.ImageServiceStub(self._other)

    def __enter__(self) -> Cri:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.close()
        self._other.close()

    def conditions(self) -> dict[str, bool]:
        """Return what the runtime says of itself: RuntimeReady, NetworkReady."""
        answer = _call(self._runtime.Status, pb.StatusRequest())
        return {row.type: row.status for row in answer.status.conditions}

    # ---- images

    def pull(self, image: str, pod: Any = None, auth: Mapping[str, str] | None = None) -> str:
        """Pull an image (for a pod of this configuration, with a pull secret: fields of AuthConfig); return its ID."""
        secret = pb.AuthConfig(**auth) if auth else None
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=secret, sandbox_config=pod)
        return str(_call(self._images.PullImage, request).image_ref)

    def image(self, image: str) -> Any:
        """Return what there is to know of an image, by name or ID; None without one."""
        answer = _call(self._images.ImageStatus, pb.ImageStatusRequest(image=pb.ImageSpec(image=image)))
        return answer.image if answer.HasField("image") else None

    def images(self) -> list[Any]:
        """Return all images."""
        return list(_call(self._images.ListImages, pb.ListImagesRequest()).images)

    def remove_image(self, image: str) -> None:
        """Remove an image with all of its names."""
        _call(self._images.RemoveImage, pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))

    def image_filesystem(self) -> Any:
        """Return what images take, and where: what kubelet decides by when the disk is full."""
        (usage,) = _call(self._images.ImageFsInfo, pb.ImageFsInfoRequest()).image_filesystems
        return usage

    # ---- pods

    def run_pod(self, pod: Any) -> str:
        """Make a pod's sandbox of this configuration (`host_pod`); return its ID."""
        return str(_call(self._runtime.RunPodSandbox, pb.RunPodSandboxRequest(config=pod)).pod_sandbox_id)

    def pod_is_ready(self, pod_id: str) -> bool:
        answer = _call(self._runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id))
        return bool(answer.status.state == pb.SANDBOX_READY)

    def stop_pod(self, pod_id: str) -> None:
        _call(self._runtime.StopPodSandbox, pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))

    def remove_pod(self, pod_id: str) -> None:
        _call(self._runtime.RemovePodSandbox, pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id))

    # ---- containers

    def create(
        self, pod_id: str, pod: Any, name: str, image: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> str:
        """Make a container (no `command`: the image's) whose log is NAME.log; return its ID."""
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image),
            command=command,
            envs=[pb.KeyValue(key=key, value=value) for key, value in environment.items()],
            log_path=f"{name}.log",
            linux=pb.LinuxContainerConfig(
                security_context=pb.LinuxContainerSecurityContext(namespace_options=_on_the_hosts_network())
            ),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod)
        return str(_call(self._runtime.CreateContainer, request).container_id)

    def start(self, container: str) -> None:
        _call(self._runtime.StartContainer, pb.StartContainerRequest(container_id=container))

    def status(self, container: str) -> Any:
        """Return a ContainerStatus."""
        return _call(self._runtime.ContainerStatus, pb.ContainerStatusRequest(container_id=container)).status

    def state(self, container: str) -> str:
        """Return "CREATED", "RUNNING", "EXITED" or "UNKNOWN"."""
        return str(pb.ContainerState.Name(self.status(container).state).removeprefix("CONTAINER_"))

    def written(self, container: str) -> int:
        """Return the bytes that a container has written into its own layer, by containerd's last look."""
        answer = _call(self._runtime.ContainerStats, pb.ContainerStatsRequest(container_id=container))
        return int(answer.stats.writable_layer.used_bytes.value)

    def execute(self, container: str, *command: str) -> str:
        """Run a command in a container; return what it printed. Raises LabFailed for another exit status than 0."""
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=int(TIMEOUT))
        answer = _call(self._runtime.ExecSync, request)
        if answer.exit_code != 0:
            raise LabFailed(f"{' '.join(command)}: status {answer.exit_code}: {answer.stderr.decode()}")
        return str(answer.stdout.decode())

    def stop(self, container: str, patience: int = 10) -> int:
        """Stop a container, by force after `patience` seconds; return its exit status."""
        _call(self._runtime.StopContainer, pb.StopContainerRequest(container_id=container, timeout=patience))
        return int(self.status(container).exit_code)

    def remove(self, container: str) -> None:
        _call(self._runtime.RemoveContainer, pb.RemoveContainerRequest(container_id=container))


def _call(method: Any, request: Any) -> Any:
    try:
        return method(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        raise LabFailed(f"{type(request).__name__}: {code.name}: {details}") from None


def host_pod(name: str, logs: Path, cgroup: str) -> Any:
    """Return the configuration of a pod on the host's network; its cgroups come below `cgroup`, logs into `logs`."""
    return pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-of-{name}", namespace="default"),
        log_directory=str(logs),
        linux=pb.LinuxPodSandboxConfig(
            cgroup_parent=cgroup,
            security_context=pb.LinuxSandboxSecurityContext(namespace_options=_on_the_hosts_network()),
        ),
    )


def _on_the_hosts_network() -> Any:
    return pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER, ipc=pb.POD)


def pause_image(directory: Path, environment: Mapping[str, str]) -> Image:
    """Make the image of a pod's sandbox: one program of some hundred bytes, which waits until it is killed."""
    machine, code = _PAUSE[images.ARCHITECTURE]
    program = _elf(machine, code)
    layout = Layout(directory)
    with layout.layer() as writer:
        info = tarfile.TarInfo("pause")
        info.mode, info.size = 0o755, len(program)
        writer.tar.addfile(info, io.BytesIO(program))
    image = layout.add_image("latest", [writer.result], command=["/pause"], environment=environment,
                             unpacked_size=len(program), files=1, architecture=images.ARCHITECTURE)  # fmt: skip
    oci_layout.save([image])
    return image


def _elf(machine: int, code: bytes) -> bytes:
    """Return a static executable: ELF header, one program header (readable, executable), code. Source: elf(5)."""
    size = _HEADERS + len(code)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56,
                         1, 64, 0, 0)  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return header + segment + code
