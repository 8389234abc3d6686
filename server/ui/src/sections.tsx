// The parts of the page, each from one part of the overview.

import type { ComponentChildren } from "preact";
import type { Happening, Kept, Overview } from "./api";
import { bytes, count, exact, millis, money, percent, plural, span } from "./words";

export function Card(props: { title: string; about?: string; wide?: boolean; children: ComponentChildren }) {
  const id = props.title.toLowerCase().replace(/\W+/g, "-");
  return (
    <section class={props.wide ? "card wide" : "card"} aria-labelledby={id}>
      <h2 id={id}>{props.title}</h2>
      {props.about && <p class="about">{props.about}</p>}
      {props.children}
    </section>
  );
}

function Tile({ name, value, detail }: { name: string; value: string; detail: string }) {
  return (
    <div class="tile">
      <dt>{name}</dt>
      <dd>
        <b>{value}</b>
        <span>{detail}</span>
      </dd>
    </div>
  );
}

// What an operator should know before anything else.
export function concerns(seen: Overview): string[] {
  const { trouble, store } = seen;
  const found: string[] = [];
  if (trouble.damaged > 0) {
    found.push(`${plural(trouble.damaged, "record")} found damaged since the start; they were answered as misses.`);
  }
  if (trouble.breaker_trips > 0) {
    found.push(`The drive failed so many reads that reading was stopped ${plural(trouble.breaker_trips, "time")}.`);
  }
  if (trouble.suspect_segments > 0) {
    found.push(`${plural(trouble.suspect_segments, "segment")} given up after a failed write.`);
  }
  if (trouble.put_errors > 0) found.push(`${plural(trouble.put_errors, "object")} could not be stored.`);
  const total = (store.limit_bytes ?? 0) || store.disk_bytes + (store.free_bytes ?? 0);
  if (store.free_bytes !== null && total > 0 && store.free_bytes < total * 0.03) {
    found.push(`The disk is nearly full: ${bytes(store.free_bytes)} are free.`);
  }
  const hourAgo = seen.now_ms - 3_600_000;
  const refused = seen.recent.filter((one) => one.kind === "refusal" && one.at_ms > hourAgo).length;
  if (refused > 0) found.push(`${plural(refused, "request")} refused in the last hour; see below for whose and why.`);
  for (const tenant of seen.tenants) {
    if (tenant.stored_bytes_limit && tenant.stored_bytes > 0.9 * tenant.stored_bytes_limit) {
      found.push(`${tenant.tenant} uses ${percent(tenant.stored_bytes, tenant.stored_bytes_limit)} of what it may store.`);
    }
  }
  return found;
}

export function Tiles({ seen }: { seen: Overview }) {
  const recent = seen.traffic.hour.requests > 0;
  const traffic = recent ? seen.traffic.hour : seen.traffic.all;
  const when = recent ? "in the last hour" : "since the start";
  const { warm, cold } = traffic;
  const saved = seen.tenants.map((tenant) => tenant.saved).filter((one) => one !== null);
  const total = saved.reduce((sum, one) => sum + Number(one), 0);
  const room = seen.store.limit_bytes ?? (seen.store.free_bytes === null ? null : seen.store.disk_bytes + seen.store.free_bytes);
  return (
    <dl class="tiles">
      <Tile
        name="Served from cache"
        value={percent(traffic.hit_tokens, traffic.prompt_tokens)}
        detail={
          traffic.requests === 0
            ? "no prompt yet"
            : `${count(traffic.hit_tokens)} of ${count(traffic.prompt_tokens)} prompt tokens ${when}`
        }
      />
      <Tile
        name="First token, warm"
        value={millis(warm.p50_ms)}
        detail={
          warm.count === 0
            ? "no warm prompt timed yet"
            : cold.p50_ms !== null && warm.p50_ms
              ? `${millis(cold.p50_ms)} cold: ${exact(Math.max(1, Math.round(cold.p50_ms / warm.p50_ms)))} times as long`
              : `median of ${plural(warm.count, "prompt")}`
        }
      />
      <Tile
        name="Stored"
        value={bytes(seen.store.bytes)}
        detail={room === null ? plural(seen.store.objects, "object") : `${percent(seen.store.disk_bytes, room)} of ${bytes(room)}`}
      />
      {seen.currency ? (
        <Tile name="Saved for tenants" value={`${money(total)} ${seen.currency}`} detail="in the last 30 days, by your price table" />
      ) : (
        <Tile name="Not computed again" value={count(seen.traffic.all.hit_tokens)} detail="tokens since the start" />
      )}
    </dl>
  );
}

const TONES = ["age0", "age1", "age2", "age3", "age4"];
const ageName = (up_to_s: number | null, before: number) =>
  up_to_s === null ? `over ${span(before)}` : `under ${span(up_to_s)}`;

export function Retention({ kept, seen }: { kept: Kept[]; seen: Overview }) {
  if (kept.every((one) => one.objects === 0)) return <p class="nothing">Nothing is stored yet.</p>;
  const most = Math.max(...kept.map((one) => one.bytes));
  const ages = kept[0].ages;
  return (
    <>
      <table>
        <thead>
          <tr>
            <th scope="col">Kept for</th>
            <th scope="col" class="number">Bytes</th>
            <th scope="col" class="number">Objects</th>
            <th scope="col" class="grow">Since last use</th>
          </tr>
        </thead>
        <tbody>
          {kept.map((one) => (
            <tr key={one.class}>
              <th scope="row">{one.class}</th>
              <td class="number">{one.objects ? bytes(one.bytes) : "–"}</td>
              <td class="number">{one.objects ? count(one.objects) : "–"}</td>
              <td>
                <div
                  class="ages"
                  role="img"
                  aria-label={one.ages
                    .map((age, at) => `${bytes(age.bytes)} ${ageName(age.up_to_s, ages[at - 1]?.up_to_s ?? 0)}`)
                    .join(", ")}
                  style={`width: ${Math.max(one.bytes ? 2 : 0, (100 * one.bytes) / most)}%`}
                >
                  {one.ages.map((age, at) => (
                    <i key={at} style={`flex-grow: ${age.bytes}; background: var(--${TONES[at]})`} />
                  ))}
                </div>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      <ul class="legend" aria-hidden="true">
        {ages.map((age, at) => (
          <li key={at}>
            <i style={`background: var(--${TONES[at]})`} /> {ageName(age.up_to_s, ages[at - 1]?.up_to_s ?? 0)}
          </li>
        ))}
      </ul>
      <p class="hint">
        {bytes(seen.store.leased_bytes)} are held by leases. Since the start {plural(seen.store.expired, "object")} expired and{" "}
        {exact(seen.store.evicted)} made room for others.
      </p>
    </>
  );
}

export function Tenants({ seen }: { seen: Overview }) {
  const priced = seen.currency !== null;
  if (seen.tenants.length === 0) return <p class="nothing">No tenant yet.</p>;
  return (
    <div class="scroll" tabIndex={0} role="group" aria-label="Tenants">
      <table>
        <thead>
          <tr>
            <th scope="col">Tenant</th>
            <th scope="col" class="number">Requests</th>
            <th scope="col" class="number">Prompt tokens</th>
            <th scope="col" class="grow">From cache</th>
            {priced && <th scope="col" class="number">Cost</th>}
            {priced && <th scope="col" class="number">Saved</th>}
            <th scope="col" class="number">Stored</th>
          </tr>
        </thead>
        <tbody>
          {seen.tenants.map((one) => (
            <tr key={one.tenant}>
              <th scope="row">{one.tenant}</th>
              <td class="number">{count(one.requests)}</td>
              <td class="number">{count(one.prompt_tokens)}</td>
              <td>
                <Meter part={one.hit_tokens} of={one.prompt_tokens} />
              </td>
              {priced && <td class="number">{one.cost === null ? "–" : money(Number(one.cost))}</td>}
              {priced && <td class="number strong">{one.saved === null ? "–" : money(Number(one.saved))}</td>}
              <td class="number">
                {bytes(one.stored_bytes)}
                {one.stored_bytes_limit && <small> of {bytes(one.stored_bytes_limit)}</small>}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      {priced ? (
        <p class="hint">The last 30 days, in {seen.currency}. Saved: what the cached tokens would have cost uncached, less what was written.</p>
      ) : (
        <p class="hint">The last 30 days. Give a price table with --prices to see money here.</p>
      )}
    </div>
  );
}

export function Meter({ part, of }: { part: number; of: number }) {
  return (
    <span class="meter">
      <span aria-hidden="true">
        <i style={`width: ${of ? (100 * part) / of : 0}%`} />
      </span>
      {percent(part, of)}
    </span>
  );
}

export function Sessions({ seen }: { seen: Overview }) {
  if (seen.sessions.length === 0) {
    return <p class="nothing">No conversation is held. OpenSession keeps one for hours, through restarts.</p>;
  }
  return (
    <div class="scroll" tabIndex={0} role="group" aria-label="Sessions">
      <table>
        <thead>
          <tr>
            <th scope="col">Session</th>
            <th scope="col">Tenant</th>
            <th scope="col" class="number">Tokens</th>
            <th scope="col" class="number">Held</th>
            <th scope="col" class="number">Ends in</th>
          </tr>
        </thead>
        <tbody>
          {seen.sessions.map((one) => (
            <tr key={`${one.tenant}/${one.name}`}>
              <th scope="row">{one.name}</th>
              <td>
                {one.tenant}
                {one.user && <small> {one.user}</small>}
              </td>
              <td class="number">{exact(one.tokens)}</td>
              <td class="number">{bytes(one.bytes)}</td>
              <td class="number">{span(one.remaining_s)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export function Warmups({ seen }: { seen: Overview }) {
  if (seen.warmups.length === 0) {
    return <p class="nothing">No warm-up job. One computes and stores prefixes before traffic asks for them.</p>;
  }
  return (
    <div class="scroll" tabIndex={0} role="group" aria-label="Warm-up jobs">
      <table>
        <thead>
          <tr>
            <th scope="col">Job</th>
            <th scope="col">State</th>
            <th scope="col" class="grow">Progress</th>
          </tr>
        </thead>
        <tbody>
          {seen.warmups.map((one) => (
            <tr key={`${one.tenant}/${one.job}`}>
              <th scope="row">
                {one.job} <small>{one.tenant}</small>
              </th>
              <td>{one.state}</td>
              <td>
                <Meter part={one.tokens_done} of={one.tokens} />
                <small class="note">
                  {exact(one.prompts_done)} of {plural(one.prompts, "prompt")}
                  {one.reason && `; ${one.reason}`}
                </small>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export function Drive({ seen }: { seen: Overview }) {
  const { drive } = seen;
  const rows: [string, string, string][] = [
    ["Read", bytes(drive.read_bytes), "since the start"],
    ["Written", bytes(drive.written_bytes), "since the start"],
  ];
  if (drive.per_day_bytes !== null) {
    rows.push(["At this rate", `${bytes(drive.per_day_bytes)} a day`, `${bytes(drive.per_day_bytes * 365)} a year`]);
  }
  rows.push(["Written ever", bytes(drive.ever_written_bytes), "by this store"]);
  if (drive.ever_accepted_bytes > 0) {
    const factor = drive.ever_written_bytes / drive.ever_accepted_bytes;
    rows.push(["For each byte put", `${factor.toFixed(2)} bytes`, "compressed; headers and padding included"]);
  }
  if (drive.device !== null && drive.device_written_bytes !== null) {
    rows.push(["Device", drive.device, `${bytes(drive.device_written_bytes)} written by everything since the machine started`]);
  }
  return (
    <dl class="facts">
      {rows.map(([name, value, about]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>
            <b>{value}</b> <small>{about}</small>
          </dd>
        </div>
      ))}
    </dl>
  );
}

export function Recent({ recent, now_ms }: { recent: Happening[]; now_ms: number }) {
  if (recent.length === 0) return <p class="nothing">Nothing was refused and nothing was found damaged.</p>;
  return (
    <ol class="recent">
      {recent.map((one, at) => (
        <li key={at}>
          <span class={`kind ${one.kind}`}>{one.kind}</span>
          <span>
            {one.what}
            {one.who && <small> {one.who}</small>}
          </span>
          <time dateTime={new Date(one.at_ms).toISOString()}>{span(Math.max(0, (now_ms - one.at_ms) / 1000))} ago</time>
        </li>
      ))}
    </ol>
  );
}
