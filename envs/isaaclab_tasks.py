"""Isaac Lab tasks of our own, which need no asset from elsewhere: "Wamrl-Balance" and "Wamrl-Push".

Importing this module imports Isaac Lab and registers both with Gymnasium, as Isaac Lab's own tasks are.

Letters: B environments. Lengths in metres, angles in radians; places are relative to the environment's origin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import isaaclab.sim as sim_utils
import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg, AssetBaseCfg, RigidObjectCfg
from isaaclab.envs import DirectRLEnv, DirectRLEnvCfg
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sensors import CameraCfg
from isaaclab.sim import SimulationCfg
from isaaclab.utils import configclass
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg
from isaaclab_newton.renderers import NewtonWarpRendererCfg
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
_UPRIGHT_RAD, _SLOW, _MIDDLE = 0.2, 1.0, 1.0
_HELD_S = 1.0  # of the end of an episode of Balance


def _physics(contacts: int) -> Any:
    solver = MJWarpSolverCfg(
        njmax=max(8, 6 * contacts),
        nconmax=max(4, contacts),
        cone="pyramidal",
        impratio=1,
        integrator="implicitfast",
    )
    return NewtonCfg(solver_cfg=solver, num_substeps=1, debug_mode=False, use_cuda_graph=True)


def _uniform(low: float, high: float, *shape: int, device: Any) -> Tensor:
    return low + (high - low) * torch.rand(*shape, device=device)


# ------------------------------------------------------------------------------------------------------ balance


@configclass
class BalanceSceneCfg(InteractiveSceneCfg):
    """A cart and pole from our own USD."""

    robot: Any = ArticulationCfg(
        prim_path="{ENV_REGEX_NS}/Robot",
        spawn=sim_utils.UsdFileCfg(usd_path=str(ASSETS / "cartpole.usda")),
        init_state=ArticulationCfg.InitialStateCfg(
            pos=(0.0, 0.0, 2.0), joint_pos={"slider_to_cart": 0.0, "cart_to_pole": 0.0}
        ),
        actuators={
            "cart": ImplicitActuatorCfg(
                joint_names_expr=["slider_to_cart"], joint_effort_limit=400.0, stiffness=0.0, damping=1.0
            ),
            "pole": ImplicitActuatorCfg(
                joint_names_expr=["cart_to_pole"], joint_effort_limit=400.0, stiffness=0.0, damping=0.0
            ),
        },
    )


@configclass
class BalanceCfg(DirectRLEnvCfg):
    """Keep the pole upright for five seconds, 60 steps each."""

    decimation = 2
    episode_length_s = 5.0
    action_space = 1
    observation_space = 4
    state_space = 0
    force_n = 20.0
    sim: SimulationCfg = SimulationCfg(dt=1 / 120, render_interval=2, physics=_physics(1))
    scene: BalanceSceneCfg = BalanceSceneCfg(num_envs=64, env_spacing=4.0, replicate_physics=True)


class Balance(DirectRLEnv):
    """State [B, 4]: cart, its speed, angle of the pole (upright: 0), its speed. Action: the force on the cart.

    The reward is in [0, 1] per step: upright and near the middle. Success, in an episode's last step: throughout its
    last second (all of it, if it is shorter) the pole was within 0.2 rad of upright and slower than 1 rad/s, the cart
    less than a metre from the middle. So no episode ends early by success, and its return is that of all of its steps.
    An episode terminates when the pole leans by more than a radian, or the cart leaves 3 m. A state that is restored
    does not tell what was before it, which then counts as held.
    """

    cfg: BalanceCfg

    def __init__(self, cfg: BalanceCfg, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(cfg, render_mode, **kwargs)
        self._robot = self.scene["robot"]
        self._cart = torch.tensor(self._robot.find_joints("slider_to_cart")[0], device=self.device)
        self._pole = torch.tensor(self._robot.find_joints("cart_to_pole")[0], device=self.device)
        self.success = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        # The step of the episode at which it was last not balanced.
        self._lost = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)

    def _pre_physics_step(self, actions: Tensor) -> None:
        self._force = self.cfg.force_n * actions

    def _apply_action(self) -> None:
        self._robot.set_joint_effort_target_index(target=self._force, joint_ids=self._cart)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        place, speed = self._robot.data.joint_pos.torch, self._robot.data.joint_vel.torch
        return place[:, self._cart], speed[:, self._cart], place[:, self._pole], speed[:, self._pole]

    def _get_observations(self) -> dict[str, Tensor]:
        state = torch.cat(self._parts(), dim=-1)
        return {"policy": state, "proprioception": state}

    def _get_dones(self) -> tuple[Tensor, Tensor]:
        cart, _, angle, turn = (part[:, 0] for part in self._parts())
        balanced = (angle.abs() < _UPRIGHT_RAD) & (turn.abs() < _SLOW) & (cart.abs() < _MIDDLE)
        self._lost = torch.where(balanced, self._lost, self.episode_length_buf)
        last = self.episode_length_buf >= self.max_episode_length
        held = min(round(_HELD_S / self.step_dt), self.max_episode_length)
        self.success = last & (self.episode_length_buf - self._lost >= held)
        over = (angle.abs() > 1.0) | (cart.abs() > 3.0)
        return over, last

    def _get_rewards(self) -> Tensor:
        cart, _, angle, _ = (part[:, 0] for part in self._parts())
        return torch.exp(-4.0 * angle.square()) * torch.exp(-0.25 * cart.square())

    def _reset_idx(self, env_ids: Any) -> None:
        super()._reset_idx(env_ids)
        self._lost[env_ids] = 0
        count, robot = len(env_ids), self._robot
        place, speed = robot.data.default_joint_pos.torch[env_ids], robot.data.default_joint_vel.torch[env_ids]
        place = place + _uniform(-0.3, 0.3, count, 2, device=self.device)
        speed = speed + _uniform(-0.3, 0.3, count, 2, device=self.device)
        pose = robot.data.default_root_pose.torch[env_ids].clone()
        pose[:, :3] += self.scene.env_origins[env_ids]
        robot.write_root_pose_to_sim_index(root_pose=pose, env_ids=env_ids)
        robot.write_joint_position_to_sim_index(position=place, env_ids=env_ids)
        robot.write_joint_velocity_to_sim_index(velocity=speed, env_ids=env_ids)


# --------------------------------------------------------------------------------------------------------- push

_RADIUS, _HALF, _GOAL = 0.04, 0.05, (0.25, 0.0)


def _thing(name: str, spawn: Any, place: tuple[float, float, float]) -> Any:
    return RigidObjectCfg(
        prim_path=f"{{ENV_REGEX_NS}}/{name}", spawn=spawn, init_state=RigidObjectCfg.InitialStateCfg(pos=place)
    )


def _solid(mass: float, colour: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "rigid_props": sim_utils.UsdPhysicsRigidBodyCfg(rigid_body_enabled=True),
        "mass_props": sim_utils.MassPropertiesCfg(mass=mass),
        "collision_props": sim_utils.CollisionPropertiesCfg(),
        "visual_material": sim_utils.PreviewSurfaceCfg(diffuse_color=colour),
    }


@configclass
class PushSceneCfg(InteractiveSceneCfg):
    """A ball that is driven, a cube, a table with a painted goal, and a camera above; primitives only."""

    table: Any = AssetBaseCfg(
        prim_path="{ENV_REGEX_NS}/Table",
        spawn=sim_utils.CuboidCfg(
            size=(1.2, 1.2, 0.1),
            collision_props=sim_utils.CollisionPropertiesCfg(),
            visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.7, 0.7, 0.7)),
        ),
        init_state=AssetBaseCfg.InitialStateCfg(pos=(0.0, 0.0, -0.05)),
    )
    goal: Any = AssetBaseCfg(
        prim_path="{ENV_REGEX_NS}/Goal",
        spawn=sim_utils.CuboidCfg(
            size=(0.16, 0.16, 0.002), visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.1, 0.7, 0.2))
        ),
        init_state=AssetBaseCfg.InitialStateCfg(pos=(*_GOAL, 0.001)),
    )
    finger: Any = _thing(
        "Finger", sim_utils.SphereCfg(radius=_RADIUS, **_solid(0.5, (0.8, 0.2, 0.2))), (-0.2, 0.0, _RADIUS)
    )
    cube: Any = _thing(
        "Cube", sim_utils.CuboidCfg(size=(2 * _HALF,) * 3, **_solid(0.2, (0.9, 0.6, 0.1))), (0.0, 0.0, _HALF)
    )
    camera: Any = CameraCfg(
        prim_path="{ENV_REGEX_NS}/Camera",
        offset=CameraCfg.OffsetCfg(pos=(0.0, 0.0, 1.2), rot=(0.0, 0.7071068, 0.0, 0.7071068), convention="world"),
        data_types=["rgb"],
        spawn=sim_utils.PinholeCameraCfg(focal_length=24.0, horizontal_aperture=20.955, clipping_range=(0.1, 20.0)),
        width=64,
        height=64,
        renderer_cfg=NewtonWarpRendererCfg(),
    )
    light: Any = AssetBaseCfg(prim_path="/World/Light", spawn=sim_utils.DistantLightCfg(intensity=2000.0))


@configclass
class PushCfg(DirectRLEnvCfg):
    """Push the cube onto the goal within four seconds, 30 steps each."""

    decimation = 4
    episode_length_s = 4.0
    action_space = 2
    observation_space = 10
    state_space = 0
    speed_m_s = 0.5
    sim: SimulationCfg = SimulationCfg(dt=1 / 120, render_interval=4, physics=_physics(16))
    scene: PushSceneCfg = PushSceneCfg(num_envs=16, env_spacing=3.0, replicate_physics=True)


class Push(DirectRLEnv):
    """State [B, 10]: finger, its velocity, cube, its velocity, goal; each x, y. Action: the finger's velocity.

    `proprioception` [B, 4] is the finger's part, `pixels` [B, 64, 64, 3] what the camera above sees. The reward is in
    [0, 1] per step: near the cube a quarter, the cube near the goal the rest. Success: the cube within 5 cm of it.
    """

    cfg: PushCfg

    def __init__(self, cfg: PushCfg, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(cfg, render_mode, **kwargs)
        self._finger, self._cube = self.scene["finger"], self.scene["cube"]
        self._goal = torch.tensor(_GOAL, device=self.device).expand(self.num_envs, 2)
        self.success = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def _pre_physics_step(self, actions: Tensor) -> None:
        self._velocity = torch.zeros(self.num_envs, 6, device=self.device)
        self._velocity[:, :2] = self.cfg.speed_m_s * actions

    def _apply_action(self) -> None:
        self._finger.write_root_velocity_to_sim_index(root_velocity=self._velocity)

    def _place(self, thing: Any) -> Tensor:
        return (thing.data.root_pos_w.torch - self.scene.env_origins)[:, :2]

    def _get_observations(self) -> dict[str, Tensor]:
        finger, cube = self._finger, self._cube
        own = torch.cat([self._place(finger), finger.data.root_lin_vel_w.torch[:, :2]], dim=-1)
        other = torch.cat([self._place(cube), cube.data.root_lin_vel_w.torch[:, :2]], dim=-1)
        pixels = self.scene["camera"].data.output["rgb"].torch[..., :3]
        return {"policy": torch.cat([own, other, self._goal], dim=-1), "proprioception": own, "pixels": pixels}

    def _get_dones(self) -> tuple[Tensor, Tensor]:
        self.success = (self._place(self._cube) - self._goal).norm(dim=-1) < 0.05
        return torch.zeros_like(self.success), self.episode_length_buf >= self.max_episode_length

    def _get_rewards(self) -> Tensor:
        cube = self._place(self._cube)
        reach, push = (self._place(self._finger) - cube).norm(dim=-1), (cube - self._goal).norm(dim=-1)
        return 0.25 * torch.exp(-5.0 * reach) + 0.75 * torch.exp(-10.0 * push)

    def _reset_idx(self, env_ids: Any) -> None:
        super()._reset_idx(env_ids)
        count = len(env_ids)
        spread = _uniform(-1.0, 1.0, count, 4, device=self.device)
        for thing, middle, half, height in (
            (self._finger, (-0.3, 0.0), spread[:, :2] * torch.tensor([0.05, 0.1], device=self.device), _RADIUS),
            (self._cube, (-0.05, 0.0), spread[:, 2:] * torch.tensor([0.05, 0.1], device=self.device), _HALF),
        ):
            pose = torch.zeros(count, 7, device=self.device)
            pose[:, :2] = torch.tensor(middle, device=self.device) + half
            pose[:, 2], pose[:, 6] = height, 1.0  # the quaternion is x, y, z, w
            pose[:, :3] += self.scene.env_origins[env_ids]
            thing.write_root_pose_to_sim_index(root_pose=pose, env_ids=env_ids)
            thing.write_root_velocity_to_sim_index(
                root_velocity=torch.zeros(count, 6, device=self.device), env_ids=env_ids
            )


for _id, _env, _cfg in (("Wamrl-Balance", Balance, BalanceCfg), ("Wamrl-Push", Push, PushCfg)):
    if _id not in gymnasium.registry:
        gymnasium.register(
            _id,
            entry_point=f"{__name__}:{_env.__name__}",
            disable_env_checker=True,
            kwargs={"env_cfg_entry_point": f"{__name__}:{_cfg.__name__}"},
        )
