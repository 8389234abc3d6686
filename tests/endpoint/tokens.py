"""Who may call: a policy, and bearer tokens that it believes."""

import base64
import json
import pathlib
import time

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

KEY = Ed25519PrivateKey.generate()
PUBLIC = base64.urlsafe_b64encode(KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).rstrip(b"=").decode()


def policy(folder, tenants):
    """Writes a policy with these tenants (TOML), and the key of its tokens, and gives its path."""
    keys = {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": PUBLIC, "kid": "k1", "alg": "EdDSA"}]}
    pathlib.Path(folder, "jwks.json").write_text(json.dumps(keys))
    path = pathlib.Path(folder, "policy.toml")
    path.write_text(f'[jwt]\njwks = "jwks.json"\naudience = "esker"\n{tenants}')
    return str(path)


def token(tenant, *roles, life_s=600, account="test"):
    now = int(time.time())
    claims = {"tenant": tenant, "roles": roles, "sub": account, "aud": "esker", "iat": now, "exp": now + life_s}
    return jwt.encode(claims, KEY, algorithm="EdDSA", headers={"kid": "k1"})
