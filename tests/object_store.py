"""A real object store on loopback, with faults on demand: errors, slow answers, cut connections, flipped bits."""

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
Answer = tuple[str, list[tuple[str, str]], bytes]  # status, headers, body
Fault = Callable[[str, int, Answer], Answer]  # (path, times it was asked for, what would be answered) -> what is


class ObjectStore:
    """moto's S3. ``fault`` is applied to every answer to a GET of an object; ``gets`` counts those by path."""

    def __init__(self) -> None:
        self.gets: Counter[str] = Counter()
        self.fault: Fault = lambda path, times, answer: answer
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": self.url}

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        caught: list[Any] = []
        with self._lock:
            body = b"".join(self._app(environ, lambda status, headers, *_: caught.append((status, headers))))
        status, headers = caught[0]
        if environ["REQUEST_METHOD"] == "GET" and path.count("/") > 1:
            with self._lock:
                self.gets[path] += 1
                times = self.gets[path]
            status, headers, body = self.fault(path, times, (status, headers, body))
        start_response(status, headers)
        return [body]

    def put(self, folder: Path, bucket: str, prefix: str = "set") -> str:
        """The files of a folder as objects; returns their URL."""
        client = boto3.client("s3", endpoint_url=self.url)
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def delete(self, url: str, name: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        boto3.client("s3", endpoint_url=self.url).delete_object(Bucket=bucket, Key=f"{prefix}/{name}")


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store that the environment of this process and its children names."""
    store = ObjectStore()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    thread = threading.Thread(target=store.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.server.shutdown()
        thread.join()
        store.server.server_close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def error_500(answer: Answer) -> Answer:
    return "500 Internal Server Error", [("Content-Type", "text/plain")], b"injected"


def cut(answer: Answer) -> Answer:
    """The connection ends in the middle of the body."""
    status, headers, body = answer
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    return status, [*kept, ("Content-Length", str(len(body)))], body[: len(body) // 2]


def flipped(answer: Answer) -> Answer:
    status, headers, body = answer
    return status, headers, body[:100] + bytes([body[100] ^ 4]) + body[101:]


def slow(seconds: float) -> Callable[[Answer], Answer]:
    def answer_late(answer: Answer) -> Answer:
        time.sleep(seconds)
        return answer

    return answer_late
