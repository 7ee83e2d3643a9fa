"""The step loop: propose, trigger, select, escalate, emit."""
