"""What to do about an error of a store."""

from __future__ import annotations

from spot_core.errors import TierDeniedError, chain

_CREDENTIALS = (
    "give this machine a role, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or key and secret "
    "in SPOT_STORAGE_OPTIONS"
)
_BY_NAME = {
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "ProfileNotFound": "set AWS_PROFILE to a profile that ~/.aws/config has",
}
_BY_CODE = {
    "NoSuchBucket": "make the bucket, or correct the URL",
    "InvalidAccessKeyId": f"these credentials are not the store's: {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret is not that of the key: {_CREDENTIALS}",
    "ExpiredToken": "the credentials have expired: get new ones, or use a role, which is asked again",
    "RequestTimeTooSkewed": "set this machine's clock by NTP: systemctl enable --now chronyd",
    "PermanentRedirect": "set the bucket's region: AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "set the bucket's region: AWS_DEFAULT_REGION",
    "IllegalLocationConstraintException": "set the bucket's region: AWS_DEFAULT_REGION",
}
# How S3 says no to somebody it knows; other stores have no code.
_REFUSALS = {None, "AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "403"}
_UNREACHABLE = "check the network, the URL, the endpoint and proxies, then ask again"


def advice(error: BaseException, permission: str, url: str) -> str:
    """permission: the one of S3 that was needed, at `url`."""
    known = _known(error)
    if known is not None:
        return known
    if not lacks_permission(error):
        return _UNREACHABLE
    from spot_core.store import s3  # brings fsspec, which `spot --help` does without

    if not s3.is_s3(url):
        return f"let this user list, read, write and delete in {url}"
    return f"allow {permission} on {_resource(permission, url)}{_key_hint(error)}"


def lacks_permission(error: BaseException) -> bool:
    """Whether the store knows who asks, and does not allow this: something else may be allowed."""
    from spot_core.store import s3

    is_refusal = isinstance(error, (TierDeniedError, PermissionError)) and _known(error) is None
    return is_refusal and s3.code_of(error) in _REFUSALS


def _known(error: BaseException) -> str | None:
    from spot_core.store import s3

    names = [_BY_NAME[name] for cause in chain(error) if (name := type(cause).__name__) in _BY_NAME]
    return names[0] if names else _BY_CODE.get(s3.code_of(error) or "")


def _resource(permission: str, url: str) -> str:
    bucket, _, prefix = url.partition("://")[2].partition("/")
    is_of_bucket = permission in {"s3:ListBucket", "s3:ListBucketMultipartUploads"}
    return f"arn:aws:s3:::{bucket}" if is_of_bucket else f"arn:aws:s3:::{bucket}/{prefix}/*"


def _key_hint(error: BaseException) -> str:
    return ", and kms:GenerateDataKey and kms:Decrypt on the bucket's key" if "kms" in str(error).lower() else ""
