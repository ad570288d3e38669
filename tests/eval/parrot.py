"""An engine for another kind of server: all that one has to write, beside its line in the table."""

from mergekit_bio.engine.interface import Generation


class Parrot:
    name = "parrot"
    remote = True
    baseline = False
    packages = ()
    advice = ""
    prefixes = None

    def __init__(self, servers, checkpoint):
        self.servers, self.checkpoint = servers, checkpoint

    @classmethod
    def missing(cls):
        return None

    @classmethod
    def set_environment(cls, *, quiet):
        pass

    @classmethod
    def check_options(cls, options):
        assert options == {"volume": 11}

    @classmethod
    def prompts_at_once(cls, settings):
        return 4

    @classmethod
    def gpus(cls, options):
        return 0

    @classmethod
    def start(cls, checkpoint, settings):
        return cls(settings.servers, checkpoint)

    def render(self, prompt):
        return f"Parrot, say: {prompt.text}"

    def generate(self, prompts, decoding):
        assert len(prompts) <= 4
        text = f"{self.checkpoint} of {self.servers[0]}"
        return [Generation(text, (1,), (0.0,), "stop", len(prompt.text), 0.0) for prompt in prompts]

    def load(self, checkpoint):
        self.checkpoint = checkpoint
        return f"feathers of {checkpoint}"

    def close(self):
        pass
