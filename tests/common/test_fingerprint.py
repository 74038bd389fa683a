"""The digests that stand in files of earlier versions: none of them may change."""

import hashlib
import json

import numpy as np

from mtft.common.fingerprint import blake2b, content_hash, file_hash, hash_number, json_hash

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_a_text_its_bytes_and_its_file_have_one_hash(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert content_hash("abc") == content_hash(b"abc") == file_hash(tmp_path / "abc") == ABC
    numbers = np.arange(3, dtype=np.float32)
    assert content_hash(numbers.data) == content_hash(numbers.tobytes())
    assert content_hash("ä") == content_hash("ä".encode())


def test_a_value_has_the_hash_of_its_canonical_json():
    assert json_hash({"b": 1, "a": [2.5, None]}) == content_hash('{"a": [2.5, null], "b": 1}')
    assert json_hash({"b": 1, "a": "ä"}, separators=(",", ":"), ensure_ascii=False) == content_hash('{"a":"ä","b":1}')


def test_numbers_are_the_first_bytes():
    assert hash_number("abc", "big", 4) == int(ABC[:8], 16)
    assert hash_number("abc", "big") == int(ABC[:16], 16)
    assert hash_number("abc", "little").to_bytes(8, "little").hex() == ABC[:16]


def test_blake2b_may_be_fed_in_parts():
    hasher = blake2b(16, b"a")
    hasher.update(b"bc")
    assert hasher.hexdigest() == hashlib.blake2b(b"abc", digest_size=16).hexdigest()


def test_a_lone_surrogate_is_hashed_as_json_escapes_it():
    assert json_hash("\ud800") == content_hash(json.dumps("\ud800"))
