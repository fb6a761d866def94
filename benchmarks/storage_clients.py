"""Other S3 clients for `storage.py`: each uploads files and downloads them into files.

Parts are of this project's size wherever it can be set, four at a time in each file, and files go side by side.
obstore, s5cmd and the aws command are optional: they take part where they are installed.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.session import Session

from spot_core.store.s3_files import PARALLEL_PARTS, PART_BYTES

_BLOCK_BYTES = 1 << 20


class Client:
    """One client. options: of a server, as s3fs takes them."""

    name = ""

    def __init__(self, options: dict[str, Any], bucket: str, folder: Path) -> None:
        self.bucket, self.folder, self.endpoint = bucket, folder, options["endpoint_url"]
        self.key = options.get("key", os.environ.get("AWS_ACCESS_KEY_ID"))
        self.secret = options.get("secret", os.environ.get("AWS_SECRET_ACCESS_KEY"))
        self.environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @staticmethod
    def is_installed() -> bool:
        return True

    def put(self, source: Path, key: str) -> None:
        raise NotImplementedError

    def get(self, key: str, target: Path) -> None:
        """target: does not exist yet."""
        raise NotImplementedError

    def put_all(self, sources: Sequence[Path], prefix: str) -> None:
        """Upload files of one folder."""
        side_by_side(lambda source: self.put(source, f"{prefix}/{source.name}"), sources)

    def get_all(self, prefix: str, targets: Sequence[Path]) -> None:
        """Download into files of one folder, which are made durable."""
        side_by_side(lambda target: self.get(f"{prefix}/{target.name}", target), targets)
        for target in targets:
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def side_by_side(call: Callable[[Path], None], paths: Sequence[Path]) -> None:
    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(call, paths))


class Boto3(Client):
    name = "boto3"

    def __init__(self, options: dict[str, Any], bucket: str, folder: Path) -> None:
        super().__init__(options, bucket, folder)
        self.s3 = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(signature_version="s3v4", max_pool_connections=32, s3={"addressing_style": "path"}),
        )
        self._config = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=PARALLEL_PARTS,
            preferred_transfer_client="classic",
        )

    def put(self, source: Path, key: str) -> None:
        self.s3.upload_file(str(source), self.bucket, key, Config=self._config)

    def get(self, key: str, target: Path) -> None:
        self.s3.download_file(self.bucket, key, str(target), Config=self._config)


class Crt(Boto3):
    """The AWS Common Runtime, which decides by itself how many parts travel at a time.

    Through s3transfer: boto3's own way to it knows no server but AWS. Its uploads end in a trailer with a checksum,
    which older servers refuse.
    """

    name = "boto3's CRT"

    def __init__(self, options: dict[str, Any], bucket: str, folder: Path) -> None:
        super().__init__(options, bucket, folder)
        from awscrt.auth import AwsCredentialsProvider
        from s3transfer import crt

        session = Session()
        serializer = crt.BotocoreCRTRequestSerializer(
            session, {"region_name": "us-east-1", "endpoint_url": self.endpoint}
        )
        provider = AwsCredentialsProvider.new_static(self.key, self.secret)
        client = crt.create_s3_crt_client(
            "us-east-1", crt_credentials_provider=provider, part_size=PART_BYTES, use_ssl=False
        )
        self._transfers = crt.CRTTransferManager(client, serializer)

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("awscrt") is not None

    def put(self, source: Path, key: str) -> None:
        self._transfers.upload(str(source), self.bucket, key).result()

    def get(self, key: str, target: Path) -> None:
        download = self._transfers.download(self.bucket, key, str(target))
        download.result()
        # Only then is the file renamed, in a thread that `result` does not wait for.
        download._coordinator.wait_until_on_done_callbacks_complete()


class Plain(Boto3):
    """The limit: one request a file, signed before, with nothing computed of the bytes and nothing verified."""

    name = "one plain HTTP request a file"

    def put(self, source: Path, key: str) -> None:
        with open(source, "rb") as file:
            connection = self._connection("put_object", key, "PUT", file)
            connection.getresponse().read()
            connection.close()

    def get(self, key: str, target: Path) -> None:
        connection = self._connection("get_object", key, "GET", None)
        answer, buffer = connection.getresponse(), memoryview(bytearray(_BLOCK_BYTES))
        with open(target, "xb", buffering=0) as file:
            while count := answer.readinto(buffer):
                file.write(buffer[:count])
        connection.close()

    def _connection(self, operation: str, key: str, method: str, body: Any) -> http.client.HTTPConnection:
        signed = urlsplit(self.s3.generate_presigned_url(operation, {"Bucket": self.bucket, "Key": key}))
        assert signed.hostname is not None
        connection = http.client.HTTPConnection(signed.hostname, signed.port, blocksize=_BLOCK_BYTES)
        connection.request(method, f"{signed.path}?{signed.query}", body)
        return connection


class Obstore(Client):
    name = "obstore"

    def __init__(self, options: dict[str, Any], bucket: str, folder: Path) -> None:
        super().__init__(options, bucket, folder)
        import obstore
        from obstore.store import S3Store

        self._obstore = obstore
        self._store = S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=self.key,
            secret_access_key=self.secret,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("obstore") is not None

    def put(self, source: Path, key: str) -> None:
        self._obstore.put(self._store, key, source, chunk_size=PART_BYTES, max_concurrency=PARALLEL_PARTS)

    def get(self, key: str, target: Path) -> None:
        size = self._obstore.head(self._store, key)["size"]
        with open(target, "xb", buffering=0) as file, ThreadPoolExecutor(PARALLEL_PARTS) as pool:

            def fetch(start: int) -> None:
                data = self._obstore.get_range(self._store, key, start=start, end=min(start + PART_BYTES, size))
                os.pwrite(file.fileno(), data, start)

            list(pool.map(fetch, range(0, size, PART_BYTES)))


class Command(Client):
    """A program: its start is part of the time."""

    program = ""

    @classmethod
    def is_installed(cls) -> bool:
        return shutil.which(cls.program) is not None

    def put_all(self, sources: Sequence[Path], prefix: str) -> None:
        self.copy(f"{sources[0].parent}/", f"s3://{self.bucket}/{prefix}/")

    def get_all(self, prefix: str, targets: Sequence[Path]) -> None:
        self.copy(f"s3://{self.bucket}/{prefix}/", f"{targets[0].parent}/")
        super().get_all(prefix, targets)

    def get(self, key: str, target: Path) -> None:
        """All were copied already."""

    def copy(self, source: str, target: str) -> None:
        raise NotImplementedError

    def run(self, *arguments: str) -> None:
        command = [self.program, *arguments]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)


class S5cmd(Command):
    name = program = "s5cmd"

    def copy(self, source: str, target: str) -> None:
        how = ("--concurrency", str(PARALLEL_PARTS), "--part-size", str(PART_BYTES >> 20))
        wanted = f"{source}*" if source.startswith("s3://") else source
        self.run("--endpoint-url", self.endpoint, "--log", "error", "cp", *how, wanted, target)


class AwsCommand(Command):
    name, program = "aws s3 cp", "aws"

    def copy(self, source: str, target: str) -> None:
        config = self.folder / "aws.config"
        figures = f"multipart_threshold = {PART_BYTES}\n  multipart_chunksize = {PART_BYTES}\n"
        config.write_text(f"[default]\ns3 =\n  {figures}  max_concurrent_requests = {2 * PARALLEL_PARTS}\n")
        self.environment["AWS_CONFIG_FILE"] = str(config)
        self.run("s3", "cp", "--endpoint-url", self.endpoint, "--only-show-errors", "--recursive", source, target)


CLIENTS: tuple[type[Client], ...] = (Plain, Boto3, Crt, Obstore, S5cmd, AwsCommand)
