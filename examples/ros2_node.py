"""A ROS 2 node that moves an arm by `openvla serve`: camera in, actions out, none that is stale.

    pip install packages/openvla-client
    python3 examples/ros2_node.py --ros-args -p url:=ws://gpu-box:8000 -p hz:=5.0 -p instruction:="open the drawer"

`action` has the numbers of one control step, in the units of the dataset (`unnorm_key`); what turns them into motion
belongs to the robot, and has to stop by itself when nothing comes for two periods. A new `instruction` begins an
episode, but wakes no DEAD guard: somebody looks at the robot, and says so.

    ros2 topic pub --once /reset std_msgs/msg/Empty
"""

import time

import numpy as np
import rclpy
from openvla_client import Audit, Limits, NoAction, connect
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Empty, Float64MultiArray, String


STEP = {"x": 0.05, "y": 0.05, "z": 0.05, "roll": 0.2, "pitch": 0.2, "yaw": 0.2}  # the most of one step, for your arm


class OpenVLANode(Node):
    def __init__(self) -> None:
        super().__init__("openvla")
        url, hz = self.parameter("url", "ws://127.0.0.1:8000"), self.parameter("hz", 5.0)
        key, self.instruction = self.parameter("unnorm_key", "") or None, self.parameter("instruction", "")
        self.client = connect(url, wait=self.parameter("wait", 120.0), images="jpeg")
        self.audit = Audit(self.parameter("audit", "openvla.jsonl"))
        self.guard = self.client.guard(key, hz=hz, limits=Limits(step=STEP), audit=self.audit.write)
        spec = self.guard.spec
        if spec.places:  # of them zeros are a motion
            raise ValueError(
                f"{', '.join(spec.places)} are places and no changes: begin with where your robot stands, from its "
                "joint states (`start` of guard.reset, `position` of guard.step), in place of the zeros below."
            )
        self.start = np.zeros(spec.action_dim)
        gripper = self.parameter("gripper", float("nan") if spec.as_recorded else 1.0)
        if np.isnan(gripper):
            raise ValueError("The gripper is in a range of its own, such as 0 to 100: -p gripper:=95.0, as it is now.")
        self.start[[*spec.grippers]] = gripper  # as they are now
        self.guard.reset(self.start)
        self.image, self.seen_at = None, 0.0
        self.actions = self.create_publisher(Float64MultiArray, "action", 1)
        self.states = self.create_publisher(String, "state", 1)
        # The newest alone: of images that queue while a step waits, an old one would be taken for one that is seen now.
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(Image, "image", self.on_image, newest)
        self.create_subscription(String, "instruction", self.on_instruction, 1)
        self.create_subscription(Empty, "reset", self.on_reset, 1)
        # By the usual clock, that of the system, a loop would wait for an hour where NTP sets it back by one.
        self.create_timer(1 / hz, self.on_step, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def parameter(self, name, default):
        return self.declare_parameter(name, default).value

    def on_image(self, message) -> None:
        if message.encoding not in ("rgb8", "bgr8"):
            raise ValueError(f"Images of encoding {message.encoding}: expected rgb8 or bgr8.")
        rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
        pixels = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
        self.image = pixels if message.encoding == "rgb8" else pixels[..., ::-1]
        self.seen_at = time.monotonic()  # not the stamp of the message, which may be of another machine

    def on_instruction(self, message) -> None:
        begins = message.data != self.instruction  # what is only said again begins nothing
        self.instruction = message.data
        if begins:
            self.guard.reset(self.start, wake=False)  # a program may have said it

    def on_reset(self, _) -> None:
        self.guard.reset(self.start)

    def on_step(self) -> None:
        if self.image is None or not self.instruction:
            return
        try:
            seen = {"images": self.image, "instruction": self.instruction}
            command = self.guard.step(seen, seen_at=self.seen_at)  # of a camera that stands still nothing acts
            self.actions.publish(Float64MultiArray(data=command.action.tolist()))
            grippers = [*self.guard.spec.grippers]
            self.start[grippers] = command.action[grippers]
        except NoAction as error:
            command = error.command
        self.states.publish(String(data=f"{command.state} {command.reason}".strip()))


def main() -> None:
    rclpy.init()
    rclpy.spin(OpenVLANode())


if __name__ == "__main__":
    main()
