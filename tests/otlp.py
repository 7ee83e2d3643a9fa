"""An OTLP/HTTP receiver on loopback: it decodes what a real exporter sends."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.proto", reason="needs the extra `otel`")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

KINDS = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}


def plain(value: Any) -> Any:
    """An OTLP attribute value as Python's."""
    kind = value.WhichOneof("value")
    return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes(holder: Any) -> dict[str, Any]:
    return {each.key: plain(each.value) for each in holder.attributes}


@dataclass
class Receiver:
    """What came.

    Attributes:
        raw: the bodies, as bytes.
        spans: decoded spans.
    """

    url: str = ""
    raw: list[bytes] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    _metrics: dict[str, Any] = field(default_factory=dict)

    def clear(self) -> None:
        self.raw.clear()
        self.spans.clear()

    def take(self, path: str, body: bytes) -> None:
        self.raw.append(body)
        request = KINDS[path]()
        request.ParseFromString(body)
        if path == "/v1/traces":
            self.spans += [span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans]
            return
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._metrics |= {metric.name: metric for metric in scope.metrics}  # sums are cumulative

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def unit(self, metric: str) -> str:
        return str(self._metrics[metric].unit)

    def points(self, metric: str) -> list[tuple[dict[str, Any], Any]]:
        """Attributes and value of each point; a histogram's value is (count, sum)."""
        found = self._metrics[metric]
        data = getattr(found, found.WhichOneof("data"))
        return [(attributes(point), _value(point)) for point in data.data_points]


def _value(point: Any) -> Any:
    if hasattr(point, "bucket_counts"):
        return point.count, point.sum
    return getattr(point, point.WhichOneof("value"))


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.take(self.path, gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
