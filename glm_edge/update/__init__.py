"""Signed updates of models over the air: publish, fetch, apply, roll back."""

from glm_edge.update.client import Client, Fetched
from glm_edge.update.keys import read_keys
from glm_edge.update.publish import Published, publish
from glm_edge.update.repository import Repository, create_repository
from glm_edge.update.rollout import Channel, in_rollout
from glm_edge.update.transport import FolderTransport, HttpTransport

__all__ = [
    "Channel",
    "Client",
    "Fetched",
    "FolderTransport",
    "HttpTransport",
    "Published",
    "Repository",
    "create_repository",
    "in_rollout",
    "publish",
    "read_keys",
]
