"""TLS certificate and token of a run: private, new at every launch, and only as good as their files."""

import os
import stat

import pytest
from cryptography import x509

from deploy import credentials


def test_secrets_are_private_and_new_at_every_launch(tmp_path):
    old_mask = os.umask(0)  # the most careless environment
    try:
        directory = tmp_path / "run" / "control"
        made = credentials.create(directory)
    finally:
        os.umask(old_mask)
    assert credentials.load(directory) == made
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {
        "certificate.pem": 0o600,
        "private_key.pem": 0o600,
        "token": 0o600,
    }
    assert len(made.token) >= 43  # 256 bits in base64
    assert made.token not in repr(made)
    assert "PRIVATE" not in repr(made)
    again = credentials.create(directory)
    assert (again.token, again.private_key) != (made.token, made.private_key)
    assert credentials.load(directory) == again


def test_a_careless_directory_is_closed_and_careless_files_are_refused(tmp_path):
    tmp_path.chmod(0o755)
    credentials.create(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(
        credentials.CredentialsError, match=r"token is open to other users \(mode 0644\): expected 0600"
    ):
        credentials.load(tmp_path)
    (tmp_path / "token").unlink()
    with pytest.raises(credentials.CredentialsError, match="token cannot be read: No such file"):
        credentials.load(tmp_path)


@pytest.mark.parametrize("host", ["learner.example.org", "10.0.0.7", "localhost", "::1"])
def test_the_certificate_names_the_loopback_and_the_host(tmp_path, host):
    certificate = x509.load_pem_x509_certificate(credentials.create(tmp_path, host).certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    assert sorted(found) == sorted({"localhost", "127.0.0.1", "::1", host})


def test_tokens_are_compared_as_wholes():
    assert credentials.same_token("abc", "abc")
    assert not any(credentials.same_token("abc", other) for other in ("", "ab", "abcd", "abd", "ä"))
