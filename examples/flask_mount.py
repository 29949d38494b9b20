"""labs in a Flask app, on one engine: /llm/ is the chat page and the API, /ask a route of Flask."""

import flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import labs
import labs_api
import labs_engine
import labs_models
import labs_serve

config = labs.load_config()
alone = labs_engine.Engine(labs.load_model(config), config.server)
engine = labs_engine.Cached(alone, config.response_cache)
site = flask.Flask(__name__)
site.register_error_handler(labs.InputError, lambda error: (str(error), 400))
site.register_error_handler(labs_engine.Busy, lambda error: (str(error), 503, {"Retry-After": "1"}))
llm = labs_api.create_app(config, labs_models.One(engine, config.model_id))
app = DispatcherMiddleware(site, {"/llm": llm})  # for any WSGI server, with threads


@site.get("/ask")
def ask() -> flask.Response:
    inputs = labs.build_inputs(engine.model, prompt=flask.request.args["question"])
    *pieces, done = engine.submit(inputs, config.generation)
    if isinstance(done, labs.Failed):
        raise done.error
    return flask.Response([getattr(each, "text", "") for each in pieces], mimetype="text/plain")


if __name__ == "__main__":
    labs_serve.make_server(app, config).run()
    engine.close()
