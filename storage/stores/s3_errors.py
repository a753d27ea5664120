"""What of boto3's errors is which StoreError, and what the user can do about it.

Owns the tables; keeps no state. No message has a secret in it: of an error by the store its code and message are
repeated, of one by boto3 its text, and neither repeats keys.
"""

from __future__ import annotations

from typing import Final

from botocore.exceptions import (
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    InvalidRegionError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    SSOError,
    TokenRetrievalError,
)

from everstep.storage.errors import (
    StoreDenied,
    StoreError,
    StoreExists,
    StoreFull,
    StoreNotFound,
    StoreUnavailable,
)

_CREDENTIALS: Final = "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role)"
# A request's body that was damaged on its way.
DAMAGED: Final = ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch")
_BY_CODE: Final[dict[str, tuple[type[StoreError], str]]] = {
    "NoSuchBucket": (StoreDenied, "there is no bucket {bucket!r}: create it, or correct the URL"),
    "InvalidBucketName": (StoreDenied, "correct the bucket's name in the URL"),
    "AccessDenied": (StoreDenied, f"{_CREDENTIALS}, and that they may list, read, write and delete in {{bucket!r}}"),
    "InvalidAccessKeyId": (StoreDenied, _CREDENTIALS),
    "SignatureDoesNotMatch": (StoreDenied, _CREDENTIALS),
    "ExpiredToken": (StoreDenied, f"{_CREDENTIALS}: they have expired"),
    "InvalidToken": (StoreDenied, _CREDENTIALS),
    "RequestTimeTooSkewed": (StoreDenied, "set this machine's clock"),
    "PermanentRedirect": (StoreDenied, "set AWS_DEFAULT_REGION to the bucket's region"),
    "AuthorizationHeaderMalformed": (StoreDenied, "set AWS_DEFAULT_REGION to the bucket's region"),
    "KeyTooLongError": (StoreDenied, "choose a shorter path"),
    "NotImplemented": (StoreDenied, "the store lacks what is needed; use another, or a newer version of it"),
    "PreconditionFailed": (StoreExists, ""),
    "NoSuchKey": (StoreNotFound, ""),
    "NoSuchUpload": (StoreNotFound, ""),
    "EntityTooLarge": (StoreFull, "the store takes no objects that large; use more ranks, or another store"),
    "QuotaExceeded": (StoreFull, "free some room, or have the quota raised"),
    "QuotaExceededException": (StoreFull, "free some room, or have the quota raised"),
    "XMinioStorageFull": (StoreFull, "free some room"),
    "XMinioAdminBucketQuotaExceeded": (StoreFull, "free some room, or have the quota raised"),
    "ConditionalRequestConflict": (StoreUnavailable, ""),
    "OperationAborted": (StoreUnavailable, ""),
    **dict.fromkeys(DAMAGED, (StoreUnavailable, "what arrived is not what was sent")),
    "RequestTimeout": (StoreUnavailable, ""),
    "SlowDown": (StoreUnavailable, ""),
}
_BY_STATUS: Final[dict[int, tuple[type[StoreError], str]]] = {
    301: (StoreDenied, "set AWS_DEFAULT_REGION to the bucket's region"),
    401: (StoreDenied, _CREDENTIALS),
    403: _BY_CODE["AccessDenied"],
    404: (StoreNotFound, ""),
    408: (StoreUnavailable, ""),
    409: (StoreExists, ""),
    412: (StoreExists, ""),
    413: _BY_CODE["EntityTooLarge"],
    429: (StoreUnavailable, ""),
    501: _BY_CODE["NotImplemented"],
    507: _BY_CODE["XMinioStorageFull"],
}
_WRONG_SETTING: Final = (ConfigNotFound, ConfigParseError, InvalidRegionError, NoRegionError, ParamValidationError)
_NO_CREDENTIALS: Final = (
    CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSOError,
    TokenRetrievalError,
)  # fmt: skip


def code_of(error: BaseException | None) -> str:
    """The store's own name of an error, like "NoSuchKey"; "" for any other error."""
    if not isinstance(error, ClientError):
        return ""
    code = str(error.response.get("Error", {}).get("Code", ""))
    # An answer to HEAD has no body to name the error in.
    return "NoSuchBucket" if code == "404" and error.operation_name == "HeadBucket" else code


def store_error(url: str, bucket: str, error: BaseException) -> StoreError:
    """The StoreError for what boto3 raised about `url`."""
    if isinstance(error, ClientError):
        kind, advice = _of_answer(error)
        details = error.response.get("Error", {})
        reason = f"{details.get('Code', 'unknown error')}: {details.get('Message') or 'no further word'}"
    else:
        kind, advice = _of_library(error)
        reason = str(error) or type(error).__name__
    advice = advice.format(bucket=bucket)
    return kind(f"{url}: {reason.rstrip('.')}" + (f"; {advice}" if advice else ""))


def _of_answer(error: ClientError) -> tuple[type[StoreError], str]:
    code = code_of(error)
    if code in _BY_CODE:
        return _BY_CODE[code]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if not status and code.isdigit():
        status = int(code)
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if 400 <= status < 500:
        return StoreDenied, "the store refuses the request"
    return StoreUnavailable, ""


def _of_library(error: BaseException) -> tuple[type[StoreError], str]:
    if isinstance(error, _NO_CREDENTIALS):
        return StoreDenied, _CREDENTIALS
    if isinstance(error, SSLError):
        return StoreDenied, "check the endpoint's certificate, and AWS_CA_BUNDLE"
    if isinstance(error, _WRONG_SETTING) or (isinstance(error, ValueError) and not isinstance(error, OSError)):
        return StoreDenied, "check AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION and ~/.aws/config"
    return StoreUnavailable, ""
