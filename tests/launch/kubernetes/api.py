"""Strict API server on loopback: it accepts only what the schemas allow, stores it, and shows it.

Requests are passed to a `cluster`, which has `objects`, `create`, `delete` and `log`.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

CORE = {
    "configmaps": "ConfigMap",
    "persistentvolumeclaims": "PersistentVolumeClaim",
    "secrets": "Secret",
    "pods": "Pod",
}
TRAINER = re.compile(r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/([^/]+)/(trainjobs)(?:/([^/]+))?")
OF_CORE = re.compile(r"/api/v1/namespaces/([^/]+)/(\w+)(?:/([^/]+))?(/log)?")


class ApiError(Exception):
    """Refusal of a request, with its reason."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.status = code, {"reason": reason, "message": message, "code": code}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def do_DELETE(self):
        self._answer(self._delete)

    def log_message(self, *_):
        pass

    def _answer(self, act):
        try:
            code, kind, body = act()
        except ApiError as error:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", **error.status}
            code, kind, body = error.code, "application/json", json.dumps(status).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _target(self):
        """Return kind, namespace, name, True for a request of the log, and the options."""
        parts = urlsplit(self.path)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        options = {name: {"True": "true"}.get(value, value) for name, value in options.items()}  # Go accepts either
        if match := TRAINER.fullmatch(parts.path):
            return "TrainJob", match[1], match[3], None, options
        match = OF_CORE.fullmatch(parts.path)
        if match is None or match[2] not in CORE:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return CORE[match[2]], match[1], match[3], match[4], options

    def _json(self, body, code=200):
        return code, "application/json", json.dumps(body).encode()

    def _get(self):
        kind, namespace, name, log, options = self._target()
        cluster = self.server.cluster
        if log:
            return 200, "text/plain", cluster.log(namespace, name, options).encode()
        if name:
            return self._json(cluster.get(kind, namespace, name))
        return self._json({"kind": f"{kind}List", "items": cluster.list(kind, namespace, options.get("labelSelector"))})

    def _post(self):
        kind, namespace, _, _, options = self._target()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if options.get("fieldValidation") != "Strict":
            raise ApiError(400, "BadRequest", "without fieldValidation=Strict, fields would be dropped in silence")
        if body.get("kind") != kind:
            raise ApiError(400, "BadRequest", f"{kind} is created here, not {body.get('kind')}")
        return self._json(self.server.cluster.create(namespace, body), 201)

    def _delete(self):
        kind, namespace, name, _, _ = self._target()
        return self._json(self.server.cluster.delete(kind, namespace, name))


def serve(cluster) -> ThreadingHTTPServer:
    """Start the server of a cluster. `server_address` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.cluster = cluster
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
