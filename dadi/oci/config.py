"""The registry client's configuration: what may be contacted, how, and for how long it is waited."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from dadi.config import SECONDS, SIZE, described


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the lists of hosts mean is said, and checked, in `dadi/oci/hosts.py`."""

    allowed: Annotated[
        tuple[str, ...],
        described(
            "registries that may be contacted, as host[:port] with wildcards * and ?; loopback, private and link-local "
            "addresses need a pattern that does not begin with a wildcard"
        ),
    ] = ("*",)
    plain_http: Annotated[
        tuple[str, ...], described("hosts, as host[:port], spoken to in plain HTTP; all others in HTTPS")
    ] = ()
    mirrors: Annotated[
        dict[str, tuple[str, ...]],
        described("by registry, the mirrors to ask before it, as host[:port][/prefix of the repository]"),
    ] = {}
    docker_config: Annotated[
        str, described('Docker configuration file with credentials; "": $DOCKER_CONFIG or ~/.docker, config.json in it')
    ] = ""
    helper_timeout: Annotated[float, Meta(gt=0), described("how long a credential helper may take", SECONDS)] = 15.0
    ca_file: Annotated[
        str, described('PEM file of certificate authorities to trust beside the system\'s; "": none')
    ] = ""
    connect_timeout: Annotated[float, Meta(gt=0), described("until a connection must stand", SECONDS)] = 5.0
    read_timeout: Annotated[
        float, Meta(gt=0), described("without a byte, or with hardly any, until a connection is given up", SECONDS)
    ] = 30.0
    retries: Annotated[
        int, Meta(ge=0, le=100), described("how often a failed request is tried again; progress starts a new count")
    ] = 5
    backoff: Annotated[float, Meta(gt=0), described("before the first retry; doubled each time", SECONDS)] = 0.2
    max_backoff: Annotated[float, Meta(gt=0), described("where the doubling stops", SECONDS)] = 10.0
    max_retry_after: Annotated[
        float, Meta(ge=0), described("the longest wait that a registry may ask for; longer is an error", SECONDS)
    ] = 60.0
    mirror_rest: Annotated[float, Meta(ge=0), described("how long a mirror that failed is left alone", SECONDS)] = 60.0
    max_manifest_size: Annotated[int, Meta(gt=0), described("the largest manifest or index accepted", SIZE)] = 4 << 20
    max_config_size: Annotated[int, Meta(gt=0), described("the largest image config accepted", SIZE)] = 8 << 20


class CredentialsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Kubelet's credential providers (`dadi/oci/kubelet.py`)."""

    providers: Annotated[
        str, described("kubelet's CredentialProviderConfig (its --image-credential-provider-config); \"\": none")
    ] = ""
    provider_directory: Annotated[
        str, described("where the providers' programs are (kubelet's --image-credential-provider-bin-dir)")
    ] = "/usr/libexec/kubernetes/kubelet-plugins/credential-provider/exec"
    provider_timeout: Annotated[float, Meta(gt=0), described("how long a provider may take", SECONDS)] = 60.0

    def __post_init__(self) -> None:
        for path in (self.providers, self.provider_directory):
            if path and not path.startswith("/"):
                raise ValueError(f"{path!r} must be an absolute path")
