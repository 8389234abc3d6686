// The page that a node shows to its operator. It asks the node again every few seconds, as long as somebody looks.

import { render } from "preact";
import { useCallback, useEffect, useState } from "preact/hooks";
import { ask, Denied, useToken, type History, type Overview, type Realm } from "./api";
import { Chart } from "./chart";
import { Card, concerns, Drive, Recent, Retention, Sessions, Tenants, Tiles, Warmups } from "./sections";
import { Prefixes } from "./tree";
import { clock, millis, span } from "./words";
import "./page.css";

const OVERVIEW_MS = 2_000;
const HISTORY_MS = 10_000;
const REALMS_MS = 30_000;

// Asks now and again while the page is seen. `null` until the first answer.
function useAsked<T>(path: string, every_ms: number, tell: (error: Error | null) => void): T | null {
  const [answer, setAnswer] = useState<T | null>(null);
  useEffect(() => {
    let over = false;
    let timer = 0;
    const again = async () => {
      if (!document.hidden) {
        try {
          const next = await ask<T>(path);
          if (over) return;
          setAnswer(next);
          tell(null);
        } catch (error) {
          if (over) return;
          tell(error as Error);
        }
      }
      timer = window.setTimeout(again, every_ms);
    };
    const seen = () => {
      if (document.hidden) return;
      clearTimeout(timer);
      void again();
    };
    document.addEventListener("visibilitychange", seen);
    void again();
    return () => {
      over = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, [path, every_ms, tell]);
  return answer;
}

function Page() {
  const [error, setError] = useState<Error | null>(null);
  const [key, setKey] = useState(0);
  const tell = useCallback((next: Error | null) => setError(next), []);
  if (error instanceof Denied) {
    return (
      <SignIn
        why={error.message}
        done={() => {
          setError(null);
          setKey(key + 1);
        }}
      />
    );
  }
  return <Board key={key} error={error} tell={tell} />;
}

function Board({ error, tell }: { error: Error | null; tell: (error: Error | null) => void }) {
  const [long, setLong] = useState(false);
  const seen = useAsked<Overview>("api/overview", OVERVIEW_MS, tell);
  const history = useAsked<History>(`api/history?span=${long ? "week" : "hour"}`, HISTORY_MS, tell);
  const realms = useAsked<Realm[]>("api/prefixes", REALMS_MS, tell);
  if (!seen) {
    return (
      <main>
        <h1>Esker</h1>
        <p class="nothing">{error ? `The node does not answer: ${error.message}` : "Asking the node …"}</p>
      </main>
    );
  }
  const points = history?.points ?? [];
  const times = points.map((point) => clock(point.at_ms, long));
  const worries = concerns(seen);
  return (
    <>
      <a class="skip" href="#tree">
        Skip to the prefixes
      </a>
      <header>
        <h1>Esker</h1>
        <p>
          {seen.node.model ?? "no model"} <span>up {span((seen.now_ms - seen.node.started_ms) / 1000)}</span>{" "}
          <span>version {seen.node.version}</span>
        </p>
        <p class={error ? "live lost" : "live"} role="status">
          {error ? "The node does not answer" : "Live"}
        </p>
      </header>
      <main>
        {worries.length === 0 ? (
          <p class="state well">Nothing needs attention.</p>
        ) : (
          <ul class="state warn" aria-label="Needs attention">
            {worries.map((worry) => (
              <li key={worry}>{worry}</li>
            ))}
          </ul>
        )}
        <Tiles seen={seen} />
        <div class="spans" role="group" aria-label="Time shown">
          <button type="button" aria-pressed={!long} onClick={() => setLong(false)}>
            Last hour
          </button>
          <button type="button" aria-pressed={long} onClick={() => setLong(true)}>
            Last 7 days
          </button>
        </div>
        <div class="cards">
          <Card title="Hit ratio" about="Of the prompt tokens, the share that came from the cache.">
            <Chart
              title="Hit ratio over time"
              times={times}
              top={100}
              show={(value) => `${Math.round(value)} %`}
              empty="No prompt in this time."
              series={[
                {
                  name: "from cache",
                  tone: "warm",
                  fill: true,
                  values: points.map((point) =>
                    point.prompt_tokens > 0 ? (100 * point.hit_tokens) / point.prompt_tokens : null,
                  ),
                },
              ]}
            />
          </Card>
          <Card title="Time to first token" about="Median, each line ten times the one below. Warm: at least half of the prompt came from the cache.">
            <Chart
              title="Time to first token"
              times={times}
              show={millis}
              log
              empty="No prompt in this time."
              series={[
                { name: "warm", tone: "warm", values: points.map((point) => point.warm_ms) },
                { name: "cold", tone: "cold", values: points.map((point) => point.cold_ms) },
              ]}
            />
          </Card>
          <Card title="What is kept" about="By how long it is kept after its last use, and how long ago that was.">
            <Retention kept={seen.kept} seen={seen} />
          </Card>
          <Card title="Recent refusals and damage">
            <Recent recent={seen.recent} now_ms={seen.now_ms} />
          </Card>
          <Card title="Tenants" wide>
            <Tenants seen={seen} />
          </Card>
          <Card title="Sessions" about="Conversations whose newest prefix a lease keeps.">
            <Sessions seen={seen} />
          </Card>
          <Card title="Warm-up jobs">
            <Warmups seen={seen} />
          </Card>
          <Card title="Drive" wide>
            <Drive seen={seen} />
          </Card>
          <div id="tree" class="wide" tabIndex={-1}>
            <Card title="Prefixes" about="Where conversations share what is stored, and where they fork." wide>
              <Prefixes realms={realms} />
            </Card>
          </div>
        </div>
      </main>
    </>
  );
}

function SignIn({ why, done }: { why: string; done: () => void }) {
  const [token, setToken] = useState("");
  return (
    <main class="signin">
      <h1>Esker</h1>
      <p>This node asks who looks. Paste a bearer token of an account with the role admin; it is kept until this tab is closed.</p>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          useToken(token.trim());
          done();
        }}
      >
        <label for="token">Token</label>
        <input
          id="token"
          type="password"
          autocomplete="off"
          value={token}
          onInput={(event) => setToken(event.currentTarget.value)}
        />
        <button type="submit">Look</button>
      </form>
      <p class="hint" role="alert">
        {why}
      </p>
    </main>
  );
}

render(<Page />, document.getElementById("page")!);
