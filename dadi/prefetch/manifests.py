"""The images that Kubernetes manifests name: YAML or JSON, several documents, lists of them. Pure.

    Pod                                          spec
    Deployment, StatefulSet, DaemonSet,
    ReplicaSet, ReplicationController, Job       spec.template.spec
    CronJob                                      spec.jobTemplate.spec.template.spec
    PodTemplate                                  template.spec
    List, *List                                  items

and there initContainers, containers, ephemeralContainers and image volumes. Of what is of another kind nothing is taken
(a Service, a ConfigMap), unless it looks like one of these: custom resources often hold a pod's template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from dadi.errors import InvalidRequest

MAX_SIZE = 16 << 20
_MOST = 10_000
_DEPTH = 20
_CONTAINERS = ("initContainers", "containers", "ephemeralContainers")


def images(text: str | bytes, where: str = "the manifest") -> list[str]:
    """Return the images in order, each once. Raises InvalidRequest for what is no YAML, or names none."""
    if len(text) > MAX_SIZE:
        raise InvalidRequest(f"{where} has more than {MAX_SIZE} bytes")
    found: dict[str, None] = {}
    try:
        for document in yaml.load_all(text, Loader=yaml.SafeLoader):
            for spec in _pods(document, 0, set()):
                found.update(dict.fromkeys(_of_pod(spec)))
                if len(found) > _MOST:
                    raise InvalidRequest(f"{where} names more than {_MOST} images")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} is no YAML: {' '.join(str(error).split())[:200]}") from None
    if not found:
        hint = "it may be a template: render it first (helm template, kustomize build)"
        raise InvalidRequest(f"{where} names no image", hint=hint)
    return list(found)


def _pods(thing: Any, depth: int, seen: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the pod specs in a document. What aliases name again is looked at once: nested ones could be endless."""
    if not isinstance(thing, dict) or depth > _DEPTH or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing.get("items"), list) and str(thing.get("kind", "List")).endswith("List"):
        for item in thing["items"]:
            yield from _pods(item, depth + 1, seen)
        return
    if _is_pod(thing.get("spec")):
        yield thing["spec"]
        return
    for key in ("spec", "template", "jobTemplate"):
        yield from _pods(thing.get(key), depth + 1, seen)


def _is_pod(spec: Any) -> bool:
    return isinstance(spec, dict) and isinstance(spec.get("containers"), list)


def _of_pod(spec: dict[str, Any]) -> Iterator[str]:
    for key in _CONTAINERS:
        for container in spec.get(key) or ():
            image = container.get("image") if isinstance(container, dict) else None
            if isinstance(image, str) and image:
                yield image
    for volume in spec.get("volumes") or ():
        image = volume.get("image") if isinstance(volume, dict) else None
        if isinstance(image, dict) and isinstance(image.get("reference"), str):
            yield image["reference"]
