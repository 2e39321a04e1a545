"""The fixture `bucket`: gs://bucket/... is a fake object store."""
from tests.fake_gcs import bucket  # noqa: F401
