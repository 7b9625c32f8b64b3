"""Tokens: what is signed is what is read, and nothing else is."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import AccessDenied, InvalidRequest, TokenRefused
from dadi.index.chunks import Blob, ChunkTable
from dadi.index.image import MAX_LAYERS, ImageIndex, ImageLayer
from dadi.oci.credentials import Credentials
from dadi.peers import shown
from dadi.peers import token as tokens
from dadi.peers.token import LEEWAY, MAX_BLOBS, MAX_TEXT, NAME, Kind, Token
from dadi.peers.tokens import MOST_TOKENS
from superpeer.who_may import blobs_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
ID = tokens.key_id(KEY.public_key())
NOW = 1_000_000


def digest(n: int) -> str:
    return digests.of(b"%d" % n)


def made(*blobs: str, **fields: object) -> Token:
    token = Token(Kind.READ, ID, "00" * 16, NOW, NOW + 600, tokens.names_of(blobs))
    return Token(**{name: fields.get(name, getattr(token, name)) for name in Token.__struct_fields__})


def find(key: str) -> object:
    return KEY.public_key() if key == ID else None


def test_what_is_signed_is_what_is_read() -> None:
    token = made(digest(1), digest(2))
    text = tokens.sign(KEY, token)
    assert tokens.verify(text, find) == token
    assert tokens.parse(text) == token
    assert "=" not in text


def test_a_renewal_says_for_which_image_and_since_when() -> None:
    reference = "r.example/a@" + digest(9)
    token = made(digest(1), kind=Kind.RENEWAL, reference=reference, authorized=NOW - 5, grant=b"g" * 16)
    assert tokens.verify(tokens.sign(KEY, token), find) == token


def test_the_largest_token_fits_a_header() -> None:
    names = bytes(NAME * MAX_BLOBS)
    token = made(kind=Kind.RENEWAL, names=names, reference="r" * 800)
    assert len(tokens.sign(KEY, token)) <= MAX_TEXT
    with pytest.raises(ValueError, match="cannot hold"):
        tokens.sign(KEY, made(names=names + bytes(NAME)))
    with pytest.raises(ValueError, match="cannot hold"):
        tokens.sign(KEY, made(names=b"odd"))


def test_a_token_for_one_blob_does_not_open_another() -> None:
    token = made(digest(1), digest(2))
    tokens.require(token, [digest(1), digest(2)])
    with pytest.raises(AccessDenied) as refused:
        tokens.require(token, [digest(1), digest(3)])
    assert refused.value.status == 403


def test_a_name_across_two_names_is_no_name() -> None:
    first, second = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
    across = "sha256:" + "ab" * 8 + "cd" * 8 + "00" * 16
    assert not made(first, second).opens(across)
    assert made(first, second, across).opens(across)


def test_a_renewal_opens_nothing() -> None:
    with pytest.raises(TokenRefused, match="renewing"):
        tokens.require(made(digest(1), kind=Kind.RENEWAL), [digest(1)])


def test_an_expired_token_is_refused_and_one_that_is_not_valid_yet_too() -> None:
    token = made()
    token.check_time(NOW)
    token.check_time(NOW + 600 + LEEWAY - 1)
    token.check_time(NOW - LEEWAY + 1)
    with pytest.raises(TokenRefused, match="expired"):
        token.check_time(NOW + 600 + LEEWAY)
    with pytest.raises(TokenRefused, match="not valid yet"):
        token.check_time(NOW - LEEWAY - 1)


def test_a_token_of_a_key_that_is_not_known_is_refused() -> None:
    stranger = made(key=tokens.key_id(OTHER.public_key()))
    with pytest.raises(TokenRefused, match="not known"):
        tokens.verify(tokens.sign(OTHER, stranger), find)


def test_a_token_signed_with_the_wrong_key_is_refused() -> None:
    with pytest.raises(TokenRefused, match="signature"):
        tokens.verify(tokens.sign(OTHER, made(digest(1))), find)


@given(st.data())
def test_a_tampered_token_is_refused_whichever_bit_was_changed(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(Kind)))
    token = made(digest(1), digest(2), kind=kind, reference="r.example/a" if kind is Kind.RENEWAL else "")
    raw = bytearray(base64.urlsafe_b64decode(tokens.sign(KEY, token) + "=="))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TokenRefused):
        tokens.verify(base64.urlsafe_b64encode(raw).rstrip(b"=").decode(), find)


def test_another_spelling_of_a_token_is_refused() -> None:
    text = tokens.sign(KEY, made(digest(1)))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(text) % 4, "the last character has bits to spare"
    respelt = text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]
    for other in (respelt, text + "=", text + "==", " " + text, text.replace("-", "+") + "\n"):
        with pytest.raises(TokenRefused):
            tokens.verify(other, find)


@given(st.binary(max_size=400))
def test_no_bytes_are_a_token_unless_we_signed_them(data: bytes) -> None:
    with pytest.raises(TokenRefused):
        tokens.verify(base64.urlsafe_b64encode(data).rstrip(b"=").decode(), find)


@given(st.binary(max_size=300), st.integers(0, 70), st.sampled_from([1, 2]))
def test_no_body_crashes_the_parser_even_where_the_signature_is_right(rest: bytes, count: int, kind: int) -> None:
    head = bytes([1, kind]) + bytes.fromhex(ID) + bytes(32) + count.to_bytes(2, "big")
    body = head + rest
    text = base64.urlsafe_b64encode(body + KEY.sign(b"dadi peer token v1\n" + body)).rstrip(b"=").decode()
    try:
        token = tokens.verify(text, find)
    except TokenRefused:
        return
    assert len(token.names) == count * NAME
    assert tokens.sign(KEY, token) == text


@given(st.text(max_size=200))
def test_no_text_crashes_the_parser(text: str) -> None:
    with pytest.raises(TokenRefused):
        tokens.verify(text, find)
    with pytest.raises(TokenRefused):
        tokens.verify(tokens.bearer(text), find)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic dTpw", "bearer a b", "Bearer a,b", "Bearer é", "Bearer " + "a" * 7000],
)
def test_a_malformed_authorization_header_is_refused(header: str | None) -> None:
    with pytest.raises(TokenRefused):
        tokens.bearer(header)


def test_a_bearer_header_is_taken_in_either_case() -> None:
    assert tokens.bearer("Bearer abc") == tokens.bearer("bearer  abc ") == "abc"


def test_a_token_does_not_show_what_it_is_made_of() -> None:
    assert tokens.sign(KEY, made(digest(1))) not in repr(made(digest(1)))


# ---- credentials on the way to a superpeer


@pytest.mark.parametrize(
    "credentials",
    [
        Credentials("user", "pass:word é"),
        Credentials(identity_token="eyJ.identity"),
        Credentials(registry_token="eyJ.registry"),
        Credentials("user", ""),
    ],
)
def test_credentials_come_out_as_they_went_in(credentials: Credentials) -> None:
    assert shown.credentials(shown.header(credentials)[shown.HEADER]) == credentials


def test_without_credentials_nothing_is_shown() -> None:
    assert shown.header(None) == shown.header(Credentials()) == {}
    assert shown.credentials(None) is None


@pytest.mark.parametrize(
    "value",
    ["", "Basic", "Basic !!!", "Basic dXNlcg==",
     "Basic OnA=", "Digest abc", "Bearer", "Bearer a b", "Basic " + "a" * 8000],
)
def test_malformed_credentials_are_refused_and_not_repeated(value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        shown.credentials(value)
    assert "dXNlcg" not in str(refused.value)


def test_credentials_that_would_break_a_header_are_not_sent() -> None:
    for credentials in (Credentials(registry_token="a\r\nX: y"), Credentials("u", "p" * 9000)):
        with pytest.raises(InvalidRequest) as refused:
            shown.header(credentials)
        assert "X: y" not in str(refused.value)


@given(st.text(max_size=100))
def test_no_header_crashes_the_reading_of_credentials(value: str) -> None:
    try:
        shown.credentials(value)
    except InvalidRequest:
        return
    assert value.split()[0].lower() in ("basic", "bearer")


def test_an_image_of_the_most_layers_has_few_enough_tokens() -> None:
    def digest(kind: int, number: int) -> str:
        return f"sha256:{kind:032x}{number:032x}"

    table = ChunkTable(0, 65536, b"")
    layers = tuple(
        ImageLayer(digest(1, n), 1, "", digest(2, n), table, digest(3, n), 1, digest(4, n), 1, 1)
        for n in range(MAX_LAYERS)
    )
    index = ImageIndex(
        version=1, manifest_digest=digest(5, 0), config_digest=digest(5, 1), platform="linux/amd64", config=b"",
        layers=layers, metadata=Blob(digest(5, 2), table), devices=(), origin="",
    )  # fmt: skip
    assert len(blobs_of(index, digest(5, 3))) <= MOST_TOKENS * MAX_BLOBS
