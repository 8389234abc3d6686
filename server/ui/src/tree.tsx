// Where conversations share and where they fork: runs of blocks, drawn to the scale of their tokens. A tree in the sense of ARIA:
// arrow keys walk it, left closes, right opens.

import { useEffect, useRef, useState } from "preact/hooks";
import type { TargetedKeyboardEvent } from "preact";
import { ask, type Forest, type Realm, type Run } from "./api";
import { bytes, exact, plural, span } from "./words";

interface Row {
  run: Run;
  path: string;
  depth: number;
  place: number;
  siblings: number;
}

// Rows drawn at once; a tree that is open wider than this is cut, and says so.
const MAX_ROWS = 400;

function rowsOf(runs: Run[], closed: Set<string>, above = "", depth = 1): Row[] {
  return runs.flatMap((run, place) => {
    const path = `${above}/${place}`;
    const row = { run, path, depth, place: place + 1, siblings: runs.length };
    return [row, ...(closed.has(path) ? [] : rowsOf(run.next, closed, path, depth + 1))];
  });
}

// Only the first forks are open in a large tree.
function closedAtFirst(runs: Run[], above = "", depth = 1): string[] {
  return runs.flatMap((run, place) => {
    const path = `${above}/${place}`;
    const below = closedAtFirst(run.next, path, depth + 1);
    return run.next.length > 0 && depth > 2 ? [path, ...below] : below;
  });
}

export function Prefixes({ realms }: { realms: Realm[] | null }) {
  const [chosen, choose] = useState<string | null>(null);
  const realm = realms?.find((one) => one.id === chosen) ?? realms?.[0];
  if (!realms) return <p class="nothing">Reading what is stored …</p>;
  if (!realm) {
    return <p class="nothing">Nothing is stored yet. Prompts of at least one block show here as soon as they are.</p>;
  }
  return (
    <>
      {realms.length > 1 && (
        <label class="choice">
          Whose{" "}
          <select value={realm.id} onChange={(event) => choose(event.currentTarget.value)}>
            {realms.map((one) => (
              <option key={one.id} value={one.id}>
                {one.owner}, {one.model}, {bytes(one.bytes)}
              </option>
            ))}
          </select>
        </label>
      )}
      <Tree key={realm.id} realm={realm} />
    </>
  );
}

function Tree({ realm }: { realm: Realm }) {
  const [forest, setForest] = useState<Forest | null>(null);
  const [failed, setFailed] = useState("");
  const [closed, setClosed] = useState<Set<string>>(new Set());
  const [focus, setFocus] = useState("/0");
  const list = useRef<HTMLUListElement>(null);
  const load = () =>
    ask<Forest>(`api/prefixes/${realm.id}`).then(
      (found) => {
        setForest(found);
        setClosed(new Set(closedAtFirst(found.roots)));
      },
      (error: Error) => setFailed(error.message),
    );
  useEffect(() => void load(), []);
  if (failed) return <p class="nothing">{failed}</p>;
  if (!forest) return <p class="nothing">Reading the tree …</p>;

  const all = rowsOf(forest.roots, closed);
  const rows = all.slice(0, MAX_ROWS);
  const walk = (path: string) => {
    setFocus(path);
    list.current?.querySelector<HTMLElement>(`[data-path="${path}"]`)?.focus();
  };
  const toggle = (path: string, close: boolean) => {
    const next = new Set(closed);
    if (close) next.add(path);
    else next.delete(path);
    setClosed(next);
  };
  const keys = (event: TargetedKeyboardEvent<HTMLUListElement>) => {
    const index = rows.findIndex((row) => row.path === focus);
    const row = rows[index];
    if (!row) return;
    const open = row.run.next.length > 0 && !closed.has(row.path);
    const act: Record<string, () => void> = {
      ArrowDown: () => rows[index + 1] && walk(rows[index + 1].path),
      ArrowUp: () => rows[index - 1] && walk(rows[index - 1].path),
      Home: () => walk(rows[0].path),
      End: () => walk(rows[rows.length - 1].path),
      ArrowRight: () => {
        if (open) walk(`${row.path}/0`);
        else if (row.run.next.length > 0) toggle(row.path, false);
      },
      ArrowLeft: () => {
        if (open) toggle(row.path, true);
        else if (row.depth > 1) walk(row.path.replace(/\/\d+$/, ""));
      },
    };
    if (!act[event.key]) return;
    event.preventDefault();
    act[event.key]();
  };
  const shared = rows.filter((row) => row.run.next.length > 1).length;
  const focused = rows.some((row) => row.path === focus) ? focus : "/0";

  return (
    <>
      <p class="hint">
        {shared === 0
          ? "No prefix here is shared by two continuations so far. "
          : "A bar is a run of tokens that is stored once; what hangs below it continues it. "}
        The scale ends at {exact(forest.tokens)} tokens.{" "}
        <button type="button" class="link" onClick={load}>
          Read again
        </button>
      </p>
      <ul class="tree" role="tree" aria-label="Stored prefixes" ref={list} onKeyDown={keys}>
        {rows.map(({ run, path, depth, place, siblings }) => {
          const tokens = run.to - run.from;
          const forks = run.next.length;
          const left = (100 * run.from) / forest.tokens;
          const wide = (100 * tokens) / forest.tokens;
          const says = [
            `${plural(tokens, "token")}, ${exact(run.from)} to ${exact(run.to)}`,
            bytes(run.bytes),
            `used ${span(run.idle_s)} ago`,
            ...(forks > 1 ? [`shared by ${plural(forks, "continuation")}`] : []),
            ...(run.states > 0 ? [plural(run.states, "resume state")] : []),
            ...(run.held ? ["held by a lease"] : []),
          ];
          return (
            <li
              key={path}
              role="treeitem"
              data-path={path}
              tabIndex={path === focused ? 0 : -1}
              aria-level={depth}
              aria-posinset={place}
              aria-setsize={siblings}
              aria-expanded={forks > 0 ? !closed.has(path) : undefined}
              aria-label={says.join(", ")}
              onFocus={() => setFocus(path)}
              onClick={() => forks > 0 && toggle(path, !closed.has(path))}
            >
              <span class="twist" aria-hidden="true">
                {forks > 0 ? (closed.has(path) ? "▸" : "▾") : ""}
              </span>
              <span class="track" aria-hidden="true">
                <i
                  class={`${forks > 1 ? "shared" : ""} ${run.held ? "held" : ""}`}
                  style={`margin-left: ${left}%; width: max(3px, ${wide}%)`}
                />
              </span>
              <span class="says" aria-hidden="true">
                <b>{exact(tokens)}</b> tokens
                <small>
                  {bytes(run.bytes)}, used {span(run.idle_s)} ago
                  {forks > 1 && `, ${forks} continue it`}
                  {run.held && ", held"}
                </small>
              </span>
            </li>
          );
        })}
      </ul>
      {(forest.truncated || all.length > rows.length) && (
        <p class="hint">Only the largest runs are shown.</p>
      )}
      <ul class="legend" aria-hidden="true">
        <li>
          <i class="shared" /> shared by several
        </li>
        <li>
          <i /> one conversation
        </li>
        <li>
          <i class="held" /> held by a lease
        </li>
      </ul>
    </>
  );
}
