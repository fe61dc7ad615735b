"""The nodes that an autoscaler of the tests starts: processes of this machine."""

from functools import partial
from unittest.mock import patch

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Ray's fake nodes, each with a folder of its own for the code that a driver sends.

    Ray's own ones share it. A node that joins unpacks the code anew, and a worker of another one that starts meanwhile
    stands in a folder that is gone: MKL then ends it.
    """

    def _create_node_with_resources_and_labels(self, *arguments):
        own = partial(parameter.RayParams, runtime_env_dir_name=f"code-{self._next_node_id}")
        with self.lock, patch.object(parameter, "RayParams", own):
            super()._create_node_with_resources_and_labels(*arguments)
