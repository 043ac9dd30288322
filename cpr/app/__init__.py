"""The use cases as functions: what `cli/` calls and prints. Nothing is printed here, nobody is asked.

examine   list_guests, check, show     survey, ask the new QEMU, rehearse, check, plan: changes nothing
modes     info
reboot    check_kexec                  the same for a new host kernel
update    prepare -> Prepared, perform -> Update
start     run                                start a guest that can be updated later
runs      recover, runs, reboots, log
world     everything that reads or writes the machine comes through `World`, so that a test gives values instead
"""

from cpr.app.byhand import Saved, load, save
from cpr.app.examine import Examined, check, list_guests, show
from cpr.app.modes import Modes, info
from cpr.app.reboot import Departure, perform_reboot
from cpr.app.rebootable import Jump, RebootCheck, check_kexec
from cpr.app.restore import restore
from cpr.app.runs import log, reboots, recover, runs
from cpr.app.start import Started, run
from cpr.app.update import Prepared, Stop, Update, perform, prepare, worst
from cpr.app.world import Choices, Handle, World, real_world
from cpr.reboot.claims import claim_on
from cpr.reboot.manifest import Mode as SaveMode
from cpr.reboot.story import Story

__all__ = [
    "Choices",
    "Departure",
    "Examined",
    "Handle",
    "Jump",
    "Modes",
    "Prepared",
    "RebootCheck",
    "SaveMode",
    "Saved",
    "Started",
    "Stop",
    "Story",
    "Update",
    "World",
    "check",
    "check_kexec",
    "claim_on",
    "info",
    "list_guests",
    "load",
    "log",
    "perform",
    "perform_reboot",
    "prepare",
    "real_world",
    "reboots",
    "recover",
    "restore",
    "run",
    "runs",
    "save",
    "show",
    "worst",
]
